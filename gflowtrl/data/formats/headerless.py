"""Tables without a header: columns that are named from outside, in their order, and checks that no header is there."""

import csv
from collections.abc import Callable, Iterable, Sequence

from .format import Columns, Parsed, Table, reads_as
from .log import parse_time
from .source import Source


#: What may separate the columns of a table.
DELIMITERS = ",\t;|"


def headerless_interactions(
    source: Source, names: Sequence[str], columns: Columns, rated: bool, option: str | None = "header"
) -> Parsed:
    """Interactions in a table whose columns are `names`, which `option` has named (`None`: the format itself).

    Raises:
        ValueError: if a column is not among them, the first line has another number of fields at any delimiter, or
            the first line is a header.
    """
    wanted = columns.user, columns.item, columns.time, columns.rating if rated else None
    table = _table(source, names, filter(None, wanted))
    numeric = (columns.time, parse_time), (columns.rating, float)
    parsers = {names.index(name): parse for name, parse in numeric if name in names}
    return Parsed(source.csv_rows(_delimiter(source, names, parsers, option)), table.interactions(*wanted))


def headerless_items(source: Source, names: Sequence[str], item: str) -> Parsed:
    """Items in a table whose columns are `names`; raises as `headerless_interactions`."""
    table = _table(source, names, (item,))
    return Parsed(source.csv_rows(_delimiter(source, names, {}, "items_header")), table.items(item))


def _table(source: Source, names: Sequence[str], needed: Iterable[str]) -> Table:
    source.expected = f"a table without a header, of the columns {', '.join(names)} in this order"
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(
            f"The columns of {source.path} were given as {', '.join(names)}, without {', '.join(missing)}. Use the "
            "names that are expected, or say which columns are meant (Columns, or --user_column, "
            "--item_column, --time_column and --rating_column; --time_column none where there is no time)."
        )
    return Table(names)


def _delimiter(source: Source, names: Sequence[str], parsers: dict[int, Callable], option: str | None) -> str:
    """The character at which the first line falls into as many fields as there are names."""
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
        reason = f"it has {most} fields, where {len(names)} columns are named; commas, tabs, ';' and '|' were tried"
        raise source.format_error_at(1, reason)
    first, second = (*rows[fits[0]], [])[:2]
    if _is_header(first, second, names, parsers):
        raise source.format_error_at(
            1,
            f"it looks like a header ({', '.join(first)}), where a table without one is read. Take this line out, or "
            + (f"leave out {option} (--{option})" if option else "use format csv"),
        )
    return fits[0]


def _is_header(first: list[str], second: list[str], names: Sequence[str], parsers: dict[int, Callable]) -> bool:
    """Whether the first row holds two of the names, or its time or rating is none where that of the second is one."""
    known = {name.casefold() for name in names}
    if sum(field.strip().casefold() in known for field in first) > 1:
        return True
    wrong = [place for place, parse in parsers.items() if not reads_as(parse, first[place])]
    return (
        bool(wrong) and len(second) == len(names) and all(reads_as(parsers[place], second[place]) for place in wrong)
    )
