"""Your own tables with named columns (`csv`, `jsonl`, `parquet`, `table`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..arrow import check_utf8
from ..json_text import json_object
from .format import Format, Header, Parsed, Request, json_lines
from .headerless import DELIMITERS, headerless_interactions, headerless_items
from .plain import Typed
from .source import Source


_BATCH_ROWS = 1 << 14
_BLOCK_ROWS = 1 << 18
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def _csv_interactions(source: Source, request: Request) -> Parsed:
    columns, names = request.columns, request.own_names()
    if columns.header is not None:
        return _timed(headerless_interactions(source, list(columns.header), columns, request.rated), request)
    delimiter = _delimiter(source, columns.item)
    return _timed(Header(source, delimiter, filter(None, names)).interactions(source, delimiter, names), request)


def _timed(parsed: Parsed, request: Request) -> Parsed:
    return Parsed(parsed.records, parsed.parse, parsed.plain, request.columns.time_format)


def _csv_items(source: Source, request: Request) -> Parsed:
    item = request.columns.item
    if request.columns.items_header is not None:
        names = list(request.columns.items_header)
        return _renamed(source, headerless_items(source, names, item), request, names)
    delimiter = _delimiter(source, item)
    header = Header(source, delimiter, (item,))
    return _renamed(source, Parsed(source.csv_rows(delimiter), header.items(item)), request, header.names)


def _renamed(source: Source, items: Parsed, request: Request, names: list[str] | None) -> Parsed:
    """Rename the columns of titles and categories; `names` are the existing columns, if known."""
    columns = request.columns
    new = {
        name: feature
        for feature, name in (("title", columns.title), ("categories", columns.categories))
        if name != feature
    }
    if missing := [name for name in new if names is not None and name not in names]:
        feature = new[missing[0]]
        raise ValueError(
            f"{source.path} has no column {missing[0]!r} for {feature.removesuffix('s')}s; it has {', '.join(names)}. "
            f"Give one of them as Columns({feature}=...) or --{feature}_column, or leave it out."
        )

    def parse(record: Any) -> tuple:
        item, row = items.parse(record)
        return item, row | {feature: row.pop(name) for name, feature in new.items() if name in row}

    return Parsed(items.records, parse) if new else items


def _delimiter(source: Source, item: str) -> str:
    """Return the delimiter that splits the header into columns that include the item column."""
    head = source.peek()
    fits = (sign for sign in DELIMITERS if item in [name.strip(' "') for name in head.split(sign)] and sign in head)
    return next(fits, ",")


def _json_interactions(source: Source, request: Request) -> Parsed:
    return _timed(json_lines(source, request.own_names()), request)


def _json_items(source: Source, request: Request) -> Parsed:
    def parse(line: str) -> tuple:
        row = json_object(line)
        return row.pop(request.columns.item), row

    return _renamed(source, Parsed(source.numbered_lines(), parse), request, None)


def _parquet_interactions(source: Source, request: Request) -> Parsed:
    names = request.own_names()
    rows = _Rows(source, [name for name in names if name is not None])
    needed = {key: name for key, name in zip(("user", "item", "time", "rating"), names, strict=True) if name}
    return _timed(Parsed(_parquet_blocks(rows, needed), tuple, Typed(needed)), request)


def _parquet_blocks(rows: _Rows, needed: Mapping[str, str]) -> Iterator[pa.Table]:
    """Yield rows in blocks for `Typed`; `needed` maps its columns to those of the table."""
    number = 1
    for batch in rows.batches([*dict.fromkeys(needed.values())], _BLOCK_ROWS):
        columns = {key: batch[name] for key, name in needed.items()}
        if "time" in columns:
            columns["time"] = _seconds(columns["time"])
        yield pa.table({"number": np.arange(number, number + len(batch))} | columns)
        number += len(batch)


def _parquet_items(source: Source, request: Request) -> Parsed:
    item = request.columns.item
    table = _Rows(source, [item])
    names = [item, *(name for name in table.names if name != item)]
    records = _parquet_rows(source, table, names)
    items = Parsed(records, lambda row: (row[0], dict(zip(names[1:], row[1:], strict=True))))
    return _renamed(source, items, request, names)


class _Rows:
    """The rows of a Parquet file, with the columns of its folders (`day=2024-05-01/part-0.parquet`), or of a table.

    Raises:
        ValueError: if the file is not readable, or lacks a needed column.
    """

    def __init__(self, source: Source, needed: list[str]):
        self._source = source
        if source.table is not None:
            self._file, names, self._folders = None, source.table.column_names, {}
        else:
            with _readable(source):
                self._file = pq.ParquetFile(source.path)
            names, self._folders = self._file.schema_arrow.names, _folder_columns(source.path)
        self.names = [*names, *(name for name in self._folders if name not in names)]
        if missing := [name for name in needed if name not in self.names]:
            raise ValueError(
                f"{source.path} lacks the columns {', '.join(missing)}; it has {', '.join(self.names)}. Give their "
                "names in Columns or with --user_column, --item_column, --time_column and --rating_column."
            )
        self._in_file = set(names)
        if twice := next((name for name in needed if names.count(name) > 1), None):
            raise ValueError(f"{source.path} has the column {twice!r} twice. Rename one of both.")

    def batches(self, names: list[str], rows: int) -> Iterator[pa.Table]:
        """Yield tables of at most `rows` rows with these columns. Text that is not UTF-8 is an error."""
        inside, number = [name for name in names if name in self._in_file], 1
        if self._file is None:
            batches = iter(self._source.table.select(inside).to_batches(rows))
        else:
            batches = self._file.iter_batches(rows, columns=inside)
        while True:
            with _readable(self._source):
                batch = next(batches, None)
            if batch is None:
                return
            table = pa.Table.from_batches([batch])
            check_utf8(table, self._source.path, number)
            number += len(table)
            for name in names:
                if name not in self._in_file:
                    table = table.append_column(name, pa.array([self._folders[name]] * len(table), pa.string()))
            yield table


def _folder_columns(path: Path) -> dict[str, str | None]:
    """Return the columns that are in the names of a file's folders, as Hive, Spark and others write them."""
    pairs = (part.partition("=") for part in path.parent.parts if "=" in part)
    return {unquote(name): None if text == _NO_PARTITION else unquote(text) for name, _, text in pairs}


def _parquet_rows(source: Source, table: _Rows, names: list[str]) -> Iterator[tuple[int, tuple]]:
    """Yield (row number, values in the order of `names`)."""
    for batch in table.batches(names, _BATCH_ROWS):
        for row in zip(*(_python_values(batch[name]) for name in names), strict=True):
            source.lines += 1
            yield source.lines, row


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # messages of Arrow do not name the file
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{source.path} is not a readable parquet file ({reason}). Check the file and the format."
        ) from None


def _python_values(column: pa.ChunkedArray) -> list:
    """Return the values of a column, with timestamps and dates as text."""
    is_time = pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)
    return (column.cast(pa.string()) if is_time else column).to_pylist()


def _seconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert timestamps and dates to seconds; return other columns as they are."""
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms"))
    if not pa.types.is_timestamp(column.type):
        return column
    return pc.divide(column.cast(pa.int64()).cast(pa.float64(), safe=False), float(_PER_SECOND[column.type.unit]))


_FEATURES = "an item column (given in Columns, or with --item_column) and features in the other columns"
_COLUMNS = (
    "a user, an item and a time column (given in Columns, or with --user_column, --item_column and --time_column; "
    "time=None, or --time_column none, if there is no time)"
)

CSV = Format(
    _csv_interactions,
    f"a header and {_COLUMNS}, separated by commas, tabs, ';' or '|'",
    _csv_items,
    f"a header, {_FEATURES}",
    own_columns=True,
    parts=(".csv", ".tsv", ".txt"),
)
JSONL = Format(
    _json_interactions,
    f"one JSON object per line with {_COLUMNS}",
    _json_items,
    f"one JSON object per line with {_FEATURES}",
    own_columns=True,
    parts=(".jsonl", ".json", ".ndjson"),
)
PARQUET = Format(_parquet_interactions, _COLUMNS, _parquet_items, _FEATURES, own_columns=True, parts=(".parquet",))
TABLE = Format(_parquet_interactions, _COLUMNS, _parquet_items, _FEATURES, own_columns=True)
