"""What the readers of all raw formats have in common: what they return, the columns, and tables with a header."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .source import Source


@dataclass(frozen=True)
class Columns:
    """Names of the columns in a table of your own: formats `csv`, `jsonl` and `parquet`.

    Args:
        user: column of the user ids.
        item: column of the item ids, in the interactions and in the items alike.
        time: column of the times, numbers of any unit or ISO 8601 text; `None` where the order of the file is the
            order in time.
        rating: column of the ratings. It is read where `min_rating` is given, and else need not be there.
        header: for a `csv` of interactions whose first line is data: the names of its columns, in their order.
        items_header: the same for a `csv` of items.
        title: column of the items' titles, which becomes the feature `title`.

    Raises:
        ValueError: if a header is one text instead of several, or names a column twice.
    """

    user: str = "user_id"
    item: str = "item_id"
    time: str | None = "timestamp"
    rating: str = "rating"
    header: Sequence[str] | None = None
    items_header: Sequence[str] | None = None
    title: str = "title"

    def __post_init__(self):
        for name in ("header", "items_header"):
            given = getattr(self, name)
            if given is not None and (isinstance(given, str) or len(given) < 2 or len(set(given)) < len(given)):
                raise ValueError(f"{name} must be two or more different names of columns, but it is {given!r}.")


class Parsed(NamedTuple):
    """The records of a file and how to parse one; `parse` raises one of `source.MALFORMED` on a bad record.

    Of interactions it returns (user, item, time, rating); of items (item, features as the file has them).
    """

    records: Iterable[tuple[int, Any]]
    parse: Callable[[Any], tuple]


class Request(NamedTuple):
    """What is asked of a reader: the columns (for tables of your own), and whether ratings are needed."""

    columns: Columns
    rated: bool


#: What to do about a table without a header.
_NO_HEADER = (
    ", which looks like a line of data. Read a table without a header with format csv and the names of its columns in "
    "their order: Columns(header=...), or --header user_id item_id rating timestamp"
)


def reads_as(parse: Callable[[str], object], text: str) -> bool:
    """Whether `parse` can read the text."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


class Table:
    """Rows of named columns, and how to parse one.

    Args:
        names: the columns in their order, each once.
        nameless: how many fields without a name may follow in a row; they are not read.
    """

    def __init__(self, names: Iterable[str], nameless: int = 0):
        self.names = list(names)
        self.most_fields = len(self.names) + nameless

    def interactions(self, user: str, item: str, time: str | None, rating: str | None) -> Callable[[list[str]], tuple]:
        """Parser of rows as (user, item, time, rating), 0 for a time or a rating of column `None`."""
        width, most = len(self.names), self.most_fields
        user_at, item_at, time_at, rating_at = (
            None if name is None else self.names.index(name) for name in (user, item, time, rating)
        )

        def parse(fields: list[str]) -> tuple:
            if len(fields) != width and not width < len(fields) <= most:
                raise ValueError(f"{len(fields)} fields, where {width} columns are named")
            when = 0.0 if time_at is None else fields[time_at]
            return fields[user_at], fields[item_at], when, 0.0 if rating_at is None else fields[rating_at]

        return parse

    def items(self, item: str) -> Callable[[Sequence[str]], tuple[str, dict[str, str]]]:
        """Parser of rows as (item, all other columns)."""

        def parse(fields: Sequence[str]) -> tuple[str, dict[str, str]]:
            if not len(self.names) <= len(fields) <= self.most_fields:
                raise ValueError(f"{len(fields)} fields, where {len(self.names)} columns are named")
            row = dict(zip(self.names, fields, strict=False))
            row.pop("", None)  # the nameless column in which tables are numbered
            return row.pop(item), row

        return parse


class Header(Table):
    """A table whose first line names its columns: checks the columns that are needed, and finds them in the rows.

    Empty names at the end, as spreadsheets write them, are no columns.

    Args:
        source: the file.
        rows: its rows, the header first; the header is taken from it.
        needed: columns that must be there.
        typed: whether the names are RecBole's `name:type`.

    Raises:
        ValueError: if the file is empty or a column is missing; the message says so where the first line looks like
            data.
    """

    def __init__(
        self, source: Source, rows: Iterator[tuple[int, list[str]]], needed: Iterable[str], typed: bool = False
    ):
        number, names = next(rows, (0, []))
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
            raise source.format_error_at(number, "the header names a column twice")


@dataclass(frozen=True)
class Format:
    """How files of one raw format are read.

    Args:
        interactions: reader of the interactions.
        expected: what a line of interactions is, for messages.
        items: reader of the items, or `None` where the format has none.
        expected_items: what a line of items is, for messages.
        has_ratings: whether `min_rating` can be asked for.
        own_columns: whether `Columns` apply.
        files: patterns of the interactions in a folder, the first that is there is taken.
        item_files: patterns of the items in that folder.
        items_beside: where the items lie that belong to a file of interactions, if they lie beside it.
    """

    interactions: Callable[[Source, Request], Parsed]
    expected: str
    items: Callable[[Source, Request], Parsed] | None = None
    expected_items: str = ""
    has_ratings: bool = True
    own_columns: bool = False
    files: tuple[str, ...] = ()
    item_files: tuple[str, ...] = ()
    items_beside: Callable[[Path], Path | None] = lambda path: None
