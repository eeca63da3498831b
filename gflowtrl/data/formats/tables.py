"""Your own tables with named columns (`csv`, `jsonl`, `parquet`)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..readers import json_object
from .format import Format, Header, Parsed, Request, json_lines
from .headerless import DELIMITERS, headerless_interactions, headerless_items
from .plain import Typed
from .source import Source


_BATCH_ROWS = 1 << 14
_BLOCK_ROWS = 1 << 18
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def _csv_interactions(source: Source, request: Request) -> Parsed:
    columns = request.columns
    if columns.header is not None:
        return headerless_interactions(source, list(columns.header), columns, request.rated)
    names, delimiter = request.own_names(), _delimiter(source, columns.item)
    return Header(source, delimiter, filter(None, names)).interactions(source, delimiter, names)


def _csv_items(source: Source, request: Request) -> Parsed:
    item = request.columns.item
    if request.columns.items_header is not None:
        names = list(request.columns.items_header)
        return _titled(source, headerless_items(source, names, item), request, names)
    delimiter = _delimiter(source, item)
    header = Header(source, delimiter, (item,))
    return _titled(source, Parsed(source.csv_rows(delimiter), header.items(item)), request, header.names)


def _titled(source: Source, items: Parsed, request: Request, names: list[str] | None) -> Parsed:
    """Rename the title column of items to `title`; `names` are the existing columns, if known."""
    title = request.columns.title
    if title == "title":
        return items
    if names is not None and title not in names:
        raise ValueError(
            f"{source.path} has no column {title!r} for titles; it has {', '.join(names)}. Give one of them as "
            "Columns(title=...) or --title_column, or leave it out."
        )
    return Parsed(items.records, _renaming(items.parse, title))


def _renaming(parse: Callable[..., tuple], title: str) -> Callable[..., tuple]:
    def parse_titled(record) -> tuple:
        item, row = parse(record)
        if title in row:
            row["title"] = row.pop(title)
        return item, row

    return parse_titled


def _delimiter(source: Source, item: str) -> str:
    """Return the delimiter that splits the header into columns that include the item column."""
    head = source.peek()
    fits = (sign for sign in DELIMITERS if item in [name.strip(' "') for name in head.split(sign)] and sign in head)
    return next(fits, ",")


def _json_interactions(source: Source, request: Request) -> Parsed:
    return json_lines(source, request.own_names())


def _json_items(source: Source, request: Request) -> Parsed:
    def parse(line: str) -> tuple:
        row = json_object(line)
        return row.pop(request.columns.item), row

    return _titled(source, Parsed(source.numbered_lines(), parse), request, None)


def _parquet_interactions(source: Source, request: Request) -> Parsed:
    names = request.own_names()
    file = _open_parquet(source, [name for name in names if name is not None])
    return Parsed(_parquet_blocks(source, file, names), tuple, Typed())


def _parquet_blocks(source: Source, file: pq.ParquetFile, names: Sequence[str | None]) -> Iterator[pa.Table]:
    """Yield rows in blocks for `Typed`."""
    needed = {key: name for key, name in zip(("user", "item", "time", "rating"), names, strict=True) if name}
    number = 1
    for batch in _batches(source, file, [*dict.fromkeys(needed.values())], _BLOCK_ROWS):
        columns = {key: batch.column(name) for key, name in needed.items()}
        if "time" in columns:
            columns["time"] = _seconds(columns["time"])
        yield pa.table({"number": np.arange(number, number + len(batch))} | columns)
        number += len(batch)


def _parquet_items(source: Source, request: Request) -> Parsed:
    item = request.columns.item
    file = _open_parquet(source, [item])
    names = [item, *(name for name in file.schema_arrow.names if name != item)]
    rows = _parquet_rows(source, file, names)
    items = Parsed(rows, lambda row: (row[0], dict(zip(names[1:], row[1:], strict=True))))
    return _titled(source, items, request, names)


def _open_parquet(source: Source, needed: list[str]) -> pq.ParquetFile:
    with _readable(source):
        file = pq.ParquetFile(source.path)
    missing = [name for name in needed if name not in file.schema_arrow.names]
    if missing:
        found = ", ".join(file.schema_arrow.names)
        raise ValueError(
            f"{source.path} lacks the columns {', '.join(missing)}; it has {found}. Give their names in Columns or "
            "with --user_column, --item_column, --time_column and --rating_column."
        )
    return file


def _parquet_rows(source: Source, file: pq.ParquetFile, names: list[str]) -> Iterator[tuple[int, tuple]]:
    """Yield (row number, values in the order of `names`)."""
    for batch in _batches(source, file, names, _BATCH_ROWS):
        for row in zip(*(_python_values(batch.column(name)) for name in names), strict=True):
            source.lines += 1
            yield source.lines, row


def _batches(source: Source, file: pq.ParquetFile, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    batches = file.iter_batches(rows, columns=names)
    while True:
        with _readable(source):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # messages of Arrow do not name the file
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{source.path} is not a readable parquet file ({reason}). Check the file and the format."
        ) from None


def _python_values(column: pa.Array) -> list:
    """Return the values of a column, with timestamps and dates as text."""
    is_time = pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)
    return (column.cast(pa.string()) if is_time else column).to_pylist()


def _seconds(column: pa.Array) -> pa.Array:
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
)
JSONL = Format(
    _json_interactions,
    f"one JSON object per line with {_COLUMNS}",
    _json_items,
    f"one JSON object per line with {_FEATURES}",
    own_columns=True,
)
PARQUET = Format(_parquet_interactions, _COLUMNS, _parquet_items, _FEATURES, own_columns=True)
