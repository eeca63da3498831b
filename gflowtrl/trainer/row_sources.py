"""The kinds of rows that a trainer takes: datasets, streams, lists of rows and DataFrames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchStream

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data.arrow import as_table, is_table

from .input_checks import Rows, check_row, check_rows, check_training_rows


def as_rows(rows: Any, name: str) -> Rows | None:
    """Return rows as a dataset. Datasets, also streamed ones, are returned as they are.

    Args:
        rows: a dataset; a list of dictionaries; or a DataFrame of pandas or polars, or another table of Arrow.
        name: name of the argument, for errors.

    Raises:
        TypeError: `rows` is something else.
    """
    if rows is None or isinstance(rows, Dataset | IterableDataset):
        return rows
    if isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(key for row in rows for key in row)  # some rows may lack a column
        return Dataset.from_list([{key: row.get(key) for key in names} for row in rows])
    if is_table(rows):
        return Dataset(as_table(rows, name))
    raise TypeError(
        f"{name} is of type {type(rows).__name__}; give a datasets.Dataset or IterableDataset, a list of rows, or a "
        f"DataFrame."
    )


def evaluation_rows(rows: Any, name: str = "eval_dataset") -> Any:
    """Return evaluation rows as a dataset or a dictionary of datasets. Streams are read: metrics need all lists."""
    if isinstance(rows, Mapping):
        return {key: evaluation_rows(part, f"{name}[{key!r}]") for key, part in rows.items()}
    rows = as_rows(rows, name)
    return Dataset.from_list(list(rows)) if isinstance(rows, IterableDataset) else rows


class RowStream(TorchStream):
    """Rows of a stream, which begins again when it has ended, so that a resumed run can skip what it has seen.

    Each row is checked when it is read; that row ids are unique cannot be checked. Accelerate would split a stream of
    `datasets` by its files, into parts of different lengths; of this class each process takes its part of each batch.

    Args:
        rows: the stream.
        catalog: the items.

    Raises:
        ValueError, TypeError: there is no row, or `check_rows` refuses the first one.
    """

    def __init__(self, rows: IterableDataset, catalog: ItemCatalog):
        self._rows, self._known = rows, frozenset(catalog.items)
        first = Dataset.from_list(list(rows.take(1)))
        check_training_rows(first)
        check_rows(first, catalog)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in count():
            self._rows.set_epoch(number)
            empty = True
            for row in self._rows:
                empty = False
                check_row(row["row_id"], row["history"], [row["target"]], self._known)
                yield row
            if empty:
                return
