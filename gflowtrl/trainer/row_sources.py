"""The kinds of rows that a trainer takes: datasets, streams, lists of rows and DataFrames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchStream

from gflowtrl.catalog import ItemCatalog
from gflowtrl.checks import one_line
from gflowtrl.data.arrow import as_table, is_table

from .input_checks import Rows, check_row, check_rows, check_training_rows


def as_rows(rows: Any, name: str) -> Rows | None:
    """Return rows as a dataset. A streamed one is returned as it is, another one without its format.

    Args:
        rows: a dataset; a list of dictionaries; or a DataFrame of pandas or polars, or another table of Arrow.
        name: name of the argument, for errors.

    Raises:
        TypeError: `rows` is something else.
        ValueError: a column has values of several types, or a dataset has a transform.
    """
    if rows is None or isinstance(rows, IterableDataset):
        return rows
    if isinstance(rows, Dataset):
        return _plain(rows, name)
    if isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows):
        return _dataset_of(rows, name)
    if is_table(rows):
        return Dataset(as_table(rows, name))
    raise TypeError(
        f"{name} is of type {type(rows).__name__}; give a datasets.Dataset or IterableDataset, a list of rows, or a "
        f"DataFrame."
    )


def _plain(rows: Dataset, name: str) -> Dataset:
    """Return a dataset whose rows are plain Python values, whatever format (torch, numpy, ...) it has."""
    if rows.format["type"] == "custom":
        raise ValueError(f"{name} has a transform, but checks need its columns; apply it with map().")
    plain = rows.with_format(None)
    return rows if rows.format == plain.format else plain


def _dataset_of(rows: list[Mapping[str, Any]], name: str) -> Dataset:
    """Return dictionaries as a dataset; some may lack a column."""
    if not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(f"{name} has rows that are not dictionaries; a row is {{'row_id', 'history', 'target', ...}}.")
    names = dict.fromkeys(key for row in rows for key in row)
    try:
        return Dataset.from_list([{key: row.get(key) for key in names} for row in rows])
    except (pa.ArrowException, OverflowError) as error:
        text = one_line(str(error))
        raise ValueError(f"{name} has a column with values of several types ({text}). Give it one type.") from None


def evaluation_rows(rows: Any, name: str = "eval_dataset") -> Any:
    """Return evaluation rows as a dataset or a dictionary of datasets. Streams are read: metrics need all lists."""
    if isinstance(rows, Mapping):
        return {key: evaluation_rows(part, f"{name}[{key!r}]") for key, part in rows.items()}
    rows = as_rows(rows, name)
    return _dataset_of(list(rows), name) if isinstance(rows, IterableDataset) else rows


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
        first = _dataset_of(list(rows.take(1)), "train_dataset")
        check_training_rows(first)
        check_rows(first, catalog)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in count():
            self._rows.set_epoch(number)
            empty = True
            for row in self._rows:
                empty = False
                check_row(row.get("row_id"), row.get("history"), [row.get("target")], self._known)
                yield row
            if empty:
                return
