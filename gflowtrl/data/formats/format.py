"""Types shared by the readers of all raw formats: column names, parsed records, tables, and format descriptions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..json_text import json_object
from .plain import Delimited, JsonLines, Plain
from .source import Source


@dataclass(frozen=True)
class Columns:
    """Column names of your own tables (formats `csv`, `jsonl`, `parquet` and `table`).

    Args:
        user: column of the user ids.
        item: column of the item ids, in both interactions and items.
        time: column of the times, numbers of any unit or ISO 8601 text; `None` if the file is in chronological order.
        rating: column of the ratings; needed only if `min_rating` is given.
        header: for a `csv` of interactions without a header line: the names of its columns, in order.
        items_header: the same for a `csv` of items.
        title: column of the item titles, which becomes the feature `title`.
        categories: column of the item categories, which becomes the feature `categories`.
        time_format: format of times that are neither numbers nor ISO 8601 text, as for `datetime.strptime`
            (`"%d.%m.%Y %H:%M"`); times without a zone are UTC.

    Raises:
        ValueError: if a header is a string instead of a list of names, or names a column twice, or the format of times
            is invalid.
    """

    user: str = "user_id"
    item: str = "item_id"
    time: str | None = "timestamp"
    rating: str = "rating"
    header: Sequence[str] | None = None
    items_header: Sequence[str] | None = None
    title: str = "title"
    categories: str = "categories"
    time_format: str | None = None

    def __post_init__(self):
        if self.time_format is not None:
            now = datetime.now(UTC)
            try:
                valid = "%" in self.time_format and now.strptime(now.strftime(self.time_format), self.time_format)
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"time_format is {self.time_format!r}; give codes of strptime, such as %Y-%m-%d.")
            if self.time is None:
                raise ValueError("time_format is given, but the column of times is None. Leave one of both out.")
        for name in ("header", "items_header"):
            given = getattr(self, name)
            if given is not None and (isinstance(given, str) or len(given) < 2 or len(set(given)) < len(given)):
                raise ValueError(f"{name} is {given!r}; it must be two or more different column names.")


class Parsed(NamedTuple):
    """The records of a file and their parser, which raises one of `source.MALFORMED` for a malformed record.

    It returns (user, item, time, rating) for interactions and (item, uncleaned features) for items.

    Attributes:
        records: (line number, record) of each record; with `plain`, blocks as described there.
        parse: the parser.
        plain: reader of many records at once, for interactions.
        time_format: format of times, see `Columns`.
    """

    records: Iterable[Any]
    parse: Callable[[Any], tuple]
    plain: Plain | None = None
    time_format: str | None = None


class Request(NamedTuple):
    """Options of a reader: the column names (for your own tables), and whether ratings are needed."""

    columns: Columns
    rated: bool

    def names(self, user: str, item: str, time: str | None, rating: str) -> tuple[str, str, str | None, str | None]:
        """Return the names of the columns that are needed."""
        return user, item, time, rating if self.rated else None

    def own_names(self) -> tuple[str, str, str | None, str | None]:
        """Return the names of the needed columns of your own table."""
        columns = self.columns
        return self.names(columns.user, columns.item, columns.time, columns.rating)


#: How to read a table without a header.
_NO_HEADER = (
    ", which looks like a line of data. Read a table without a header with format csv and its column names in order: "
    "Columns(header=...), or --header user_id item_id rating timestamp"
)


def reads_as(parse: Callable[[str], object], text: str) -> bool:
    """Return whether `parse` accepts the text."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


class Table:
    """Parsers of rows with named columns.

    Args:
        names: the distinct column names, in order.
        nameless: maximum number of additional fields without a name at the end of a row, which are ignored.
        wanted: what a row should have, for messages; by default the number of names.
    """

    def __init__(self, names: Iterable[str], nameless: int = 0, wanted: str = ""):
        self.names = list(names)
        self.wanted = wanted or f"for {len(self.names)} named columns"
        self.most_fields = len(self.names) + nameless

    def interactions(
        self,
        source: Source,
        delimiter: str,
        columns: Sequence[str | None],
        encoding: str = "utf-8-sig",
        quoted: bool = True,
    ) -> Parsed:
        """Return the interactions of a file.

        Args:
            source: the file.
            delimiter: the sign between fields.
            columns: names of the columns of user, item, time and rating; `None`: 0.
            encoding: as in `Source.blocks`.
            quoted: whether fields may be in quotes.
        """
        width, most = len(self.names), self.most_fields
        places = [None if name is None else self.names.index(name) for name in columns]
        user_at, item_at, time_at, rating_at = places

        def parse(fields: list[str]) -> tuple:
            if not width <= len(fields) <= most:
                raise ValueError(f"{len(fields)} fields {self.wanted}")
            when = 0.0 if time_at is None else fields[time_at]
            return fields[user_at], fields[item_at], when, 0.0 if rating_at is None else fields[rating_at]

        rest = partial(source.csv_rows, delimiter, encoding, quoted)
        return Parsed(text_blocks(source, encoding), parse, Delimited(delimiter, places, width, most, quoted, rest))

    def items(self, item: str) -> Callable[[Sequence[str]], tuple[str, dict[str, str]]]:
        """Return a parser of rows to (item, all other columns)."""

        def parse(fields: Sequence[str]) -> tuple[str, dict[str, str]]:
            if not len(self.names) <= len(fields) <= self.most_fields:
                raise ValueError(f"{len(fields)} fields {self.wanted}")
            row = dict(zip(self.names, fields, strict=False))
            row.pop("", None)  # an index column without a name
            return row.pop(item), row

        return parse


class Header(Table):
    """A table whose first line contains the column names.

    Empty names at the end, as written by spreadsheets, are ignored.

    Args:
        source: the file.
        delimiter: the sign between fields.
        needed: required columns.
        typed: whether the names have the form `name:type` of RecBole.
        quoted: whether fields may be in quotes.

    Raises:
        ValueError: if the file is empty or a column is missing; the message mentions it if the first line looks like
            data.
    """

    def __init__(
        self, source: Source, delimiter: str, needed: Iterable[str], typed: bool = False, quoted: bool = True
    ):
        rows = source.csv_rows(delimiter, quoted=quoted)
        number, names = next(rows, (0, []))
        rows.close()
        source.first_line = number + 1
        if not names:
            raise source.nothing()
        named = list(map(str.strip, names))
        while named and not named[-1]:
            named.pop()
        parts = (name.partition(":") if typed else (name, "", "") for name in named)
        self.types = {name: kind for name, _, kind in parts}
        super().__init__(self.types, nameless=len(names) - len(named))
        missing = [name for name in needed if name not in self.types]
        if missing:
            reason = f"the header lacks {', '.join(missing)}; it has {', '.join(self.names)}"
            data = any(reads_as(float, name) for name in self.names)
            raise source.format_error_at(number, reason + (_NO_HEADER if data else ""))
        if len(self.names) < len(named):
            raise source.format_error_at(number, "the header has a column name twice")


def text_blocks(source: Source, encoding: str = "utf-8-sig") -> Iterator[pa.Table]:
    """Yield the lines of a file from `first_line` on, in blocks for a `Plain` reader."""
    for number, lines in source.blocks(encoding):
        block = pa.table({"number": np.arange(number, number + len(lines)), "line": lines})
        if skipped := max(0, source.first_line - number):
            block = block.slice(skipped)
        if len(block):
            yield block


def json_lines(source: Source, columns: Sequence[str | None]) -> Parsed:
    """Return the interactions of a file with one JSON object per line.

    Args:
        source: the file.
        columns: keys of user, item, time and rating; `None`: 0.
    """
    user, item, time, rating = columns

    def parse(line: str) -> tuple:
        row = json_object(line)
        when = 0.0 if time is None else row[time]
        return row[user], row[item], when, 0.0 if rating is None else row[rating]

    return Parsed(text_blocks(source), parse, JsonLines(*columns))


@dataclass(frozen=True)
class Format:
    """Readers and files of one raw format.

    Args:
        interactions: reader of the interactions.
        expected: description of the interactions file, for messages.
        items: reader of the items, or `None` if the format has no items.
        expected_items: description of the items file, for messages.
        has_ratings: whether `min_rating` is supported.
        own_columns: whether `Columns` is supported.
        files: patterns of the interactions file in a folder; the first pattern with a match is used.
        item_files: patterns of the items file in that folder.
        parts: endings of the names of the files that a folder stands for.
        items_beside: function from an interactions file to its items file in the same folder, or `None`.
    """

    interactions: Callable[[Source, Request], Parsed]
    expected: str
    items: Callable[[Source, Request], Parsed] | None = None
    expected_items: str = ""
    has_ratings: bool = True
    own_columns: bool = False
    files: tuple[str, ...] = ()
    item_files: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    items_beside: Callable[[Path], Path | None] = lambda path: None
