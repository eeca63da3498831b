"""Sequences and items in Parquet, as warehouses and clusters write them: `sequences.parquet` and `items.parquet`.

Each is a file, or a folder of part files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gflowtrl.catalog import Item
from gflowtrl.files import reading, write_atomically

from .arrow import check_utf8
from .interactions import InteractionData, flat_times, flatten
from .sequences import Sequences


SEQUENCES_FILE, ITEMS_FILE = "sequences.parquet", "items.parquet"


def read_parquet_sequences(file: Path) -> tuple[list[Item], Sequences[Item], Sequences[float] | None]:
    """Read the users, their items, oldest first, and their times if there is a column `times`.

    Raises:
        ValueError: the file is broken, lacks a column, or has a missing value or one of another type; the message
            names the file and the row.
    """
    table = _read(file, ["user", "items"], ["times"])
    users = _ids(file, table["user"], "user")
    offsets, values = _lists(file, table["items"], "items")
    if len(offsets) == 1:
        raise ValueError(f"{file} is empty. It needs one row per user.")
    if (empty := np.flatnonzero(np.diff(offsets) == 0)).size:
        raise ValueError(f"{file}, row {empty[0] + 1} has no items. Give a list with at least one item.")
    _check_id_type(file, values.type, "item")
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    names = _ids(file, values.dictionary, "item")
    sequences, times = Sequences.with_sorted_names(values.indices.to_numpy(), offsets, names), None
    if "times" in table.column_names and not table["times"].null_count:  # a user may have been added without times
        begins, moments = _lists(file, table["times"], "times")
        if not (pa.types.is_integer(moments.type) or pa.types.is_floating(moments.type)):
            raise ValueError(f"{file}: times are of type {moments.type}. Write them as numbers, such as seconds.")
        if (different := np.flatnonzero(begins != offsets)).size:
            raise ValueError(f"{file}, row {different[0]}: 'times' must be a list of one number per item.")
        times = Sequences(moments.to_numpy(), offsets)
        if not np.isfinite(times.values).all():
            raise ValueError(f"{file}: a time is not a number. Write times as numbers, such as seconds.")
    return users, sequences, times


def read_parquet_items(file: Path) -> Iterator[tuple[str, Item, dict[str, Any]]]:
    """Yield (file and row, item, features) of each item. Missing values are left out; dates and decimals become text.

    Raises:
        ValueError: the file is broken or its text is not UTF-8, or an item is missing or of another type.
    """
    table = _read(file, ["item"], None)
    for place, (name, kind) in enumerate(zip(table.column_names, table.schema.types, strict=True)):
        if pa.types.is_decimal(kind) or (pa.types.is_temporal(kind) and not pa.types.is_duration(kind)):
            table = table.set_column(place, name, table[name].cast(pa.string()))
        elif not _is_json(kind):
            raise ValueError(
                f"{file}: the column {name!r} is of type {kind}. Write it as text, numbers or lists of them, or leave "
                "it out."
            )
    items = _ids(file, table["item"], "item")
    rows = (row for batch in table.drop_columns("item").to_batches() for row in batch.to_pylist())
    if table.num_columns == 1:
        rows = iter([{}] * len(items))
    for number, (item, row) in enumerate(zip(items, rows, strict=True), 1):
        yield f"{file}, row {number}", item, {name: value for name, value in row.items() if value is not None}


def write_parquet_sequences(data: InteractionData, file: Path) -> None:
    """Write the users, their items and their times, so that `read_parquet_sequences` returns them again."""
    codes, offsets = flatten(data.sequences, data.items)
    ends = pa.array(offsets, pa.int64())
    items = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(data.items))
    columns = {"user": pa.array(data.users), "items": pa.LargeListArray.from_arrays(ends, items)}
    if data.times is not None:
        try:
            times = pa.array(flat_times(data.times))
        except (pa.ArrowException, OverflowError):
            raise ValueError(
                f"{data.name}: a time does not fit into 64 bits. Write the folder as JSON lines."
            ) from None
        columns["times"] = pa.LargeListArray.from_arrays(ends, times)
    write_atomically(file, lambda partial: pq.write_table(pa.table(columns), partial))


def is_text(kind: pa.DataType) -> bool:
    """Return whether values of a type are text."""
    kind = _decoded(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _decoded(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values of a dictionary; other types as they are."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_json(kind: pa.DataType) -> bool:
    """Return whether values of a type can be written as JSON."""
    kind = _decoded(kind)
    if pa.types.is_nested(kind) and not (pa.types.is_map(kind) or pa.types.is_union(kind)):
        return all(_is_json(kind.field(place).type) for place in range(kind.num_fields))
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return is_text(kind) or numbers or pa.types.is_null(kind)


def _read(file: Path, needed: list[str], others: list[str] | None) -> pa.Table:
    """Read the needed columns and those of `others` that exist (`None`: all)."""
    with reading(file, "Parquet"):
        found = pq.ParquetDataset(file).schema.names
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"{file} lacks the columns {', '.join(missing)}; it has {', '.join(found)}. Rename them.")
    with reading(file, "Parquet"):
        names = None if others is None else [*needed, *(name for name in others if name in found)]
        table = pq.read_table(file, columns=names)
    check_utf8(table, file)
    return table


def _lists(file: Path, column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, pa.Array]:
    """Return where each list begins, `(rows + 1,)`, and the values of all lists."""
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ValueError(f"{file}: the column {name!r} is of type {column.type}. It must hold a list per row.")
    if column.null_count:
        raise ValueError(f"{file}, row {_first_missing(column)}: {name!r} is missing.")
    lengths = np.concatenate([[0], *(pc.list_value_length(chunk).to_numpy() for chunk in column.chunks)])
    offsets, values = np.cumsum(lengths, dtype=np.int64), pc.list_flatten(column)
    if values.null_count:
        row = np.searchsorted(offsets, _first_missing(values) - 1, side="right")
        raise ValueError(f"{file}, row {row}: a value of {name!r} is missing. Leave it out of the list.")
    return offsets, _whole(values)


def _whole(values: pa.ChunkedArray) -> pa.Array:
    """Return all chunks as one array."""
    if pa.types.is_string(values.type):
        values = values.cast(pa.large_string())  # an array of the other type holds 2 GiB
    return pa.concat_arrays(values.unify_dictionaries().chunks) if values.num_chunks else pa.array([], values.type)


def _first_missing(values: pa.ChunkedArray) -> int:
    return int(np.argmax(values.is_null().to_numpy())) + 1


def _check_id_type(file: Path, kind: pa.DataType, name: str) -> pa.DataType:
    """Return the type of ids, or of the ids in a dictionary, if it is one of ids."""
    kind = _decoded(kind)
    if not (pa.types.is_integer(kind) or is_text(kind)):
        raise ValueError(f"{file}: {name}s are of type {kind}. They must be whole numbers or text.")
    return kind


def _ids(file: Path, column: pa.ChunkedArray | pa.Array, name: str) -> list[Item]:
    """Return the ids of a column: whole numbers or texts."""
    kind = _check_id_type(file, column.type, name)
    if column.null_count:
        missing = _first_missing(column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column]))
        raise ValueError(f"{file}, row {missing}: {name!r} is missing.")
    found = column.to_pylist()
    if kind == pa.uint64() and found and max(found) >= 2**63:
        raise ValueError(f"{file}: {name} {max(found)} does not fit into 64 bits. Write all such ids as strings.")
    return found
