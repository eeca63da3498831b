"""Tables without a header: reading with given column names, and a check that the file really has no header."""

import csv
from collections.abc import Callable, Iterable, Sequence

from .format import Columns, Parsed, Request, Table, reads_as
from .log import parse_time
from .source import Source


#: Supported column separators.
DELIMITERS = ",\t;|"


def headerless_interactions(
    source: Source, names: Sequence[str], columns: Columns, rated: bool, option: str | None = "header"
) -> Parsed:
    """Read interactions from a table with the columns `names`.

    `option` is the option that specified the names; `None` means that the format itself defines them.

    Raises:
        ValueError: if a column is not in `names`, no delimiter splits the first line into as many fields, or the first
            line is a header.
    """
    wanted = Request(columns, rated).own_names()
    table = _table(source, names, filter(None, wanted))
    numeric = (columns.time, parse_time), (columns.rating, float)
    parsers = {names.index(name): parse for name, parse in numeric if name in names}
    return table.interactions(source, _delimiter(source, names, parsers, option), wanted)


def headerless_items(source: Source, names: Sequence[str], item: str) -> Parsed:
    """Read items from a table with the columns `names`; errors as in `headerless_interactions`."""
    table = _table(source, names, (item,))
    return Parsed(source.csv_rows(_delimiter(source, names, {}, "items_header")), table.items(item))


def _table(source: Source, names: Sequence[str], needed: Iterable[str]) -> Table:
    source.expected = f"a table without a header and with the columns {', '.join(names)} in this order"
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(
            f"The columns of {source.path} were given as {', '.join(names)}, without {', '.join(missing)}. Use the "
            "expected names, or specify the columns (Columns, or --user_column, --item_column, --time_column and "
            "--rating_column; --time_column none if there is no time)."
        )
    return Table(names)


def _delimiter(source: Source, names: Sequence[str], parsers: dict[int, Callable], option: str | None) -> str:
    """Return the delimiter that splits the first line into as many fields as there are names."""
    lines = source.peek_lines(2)
    if not lines:
        raise source.nothing()
    try:
        rows = {sign: list(csv.reader(lines, delimiter=sign)) for sign in DELIMITERS}
    except csv.Error as error:
        raise source.format_error_at(1, str(error)) from None
    fits = [sign for sign in DELIMITERS if len(rows[sign][0]) == len(names)]
    if not fits:
        most = max(len(found[0]) for found in rows.values())
        reason = f"it has {most} fields for {len(names)} named columns; commas, tabs, ';' and '|' were tried"
        raise source.format_error_at(1, reason)
    first, second = (*rows[fits[0]], [])[:2]
    if _is_header(first, second, names, parsers):
        raise source.format_error_at(
            1,
            f"it looks like a header ({', '.join(first)}), but a table with no header is expected. Remove the line, "
            + (f"or leave out {option} (--{option})" if option else "or use format csv"),
        )
    return fits[0]


def _is_header(first: list[str], second: list[str], names: Sequence[str], parsers: dict[int, Callable]) -> bool:
    """Return whether row one contains two of the names, or an invalid time or rating that is valid in row two."""
    known = {name.casefold() for name in names}
    if sum(field.strip().casefold() in known for field in first) > 1:
        return True
    wrong = [place for place, parse in parsers.items() if not reads_as(parse, first[place])]
    return (
        bool(wrong) and len(second) == len(names) and all(reads_as(parsers[place], second[place]) for place in wrong)
    )
