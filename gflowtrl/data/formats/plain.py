"""Reading of many lines at once: DuckDB reads the plain lines of a block, and the parser of the format the others.

A line is plain if SQL certainly reads from it what the format's parser would read. Two kinds of JSON are read that the
parser refuses: deeply nested, and with `nan` or `inf` in small letters in a column that is not needed.
"""

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from ..database import text_literal
from ..parquet import is_text


UNREADABLE = "\ufffd"  # replacement of bytes that cannot be decoded
MOST_SECONDS = 1e300

_MOST_FIELD_CHARACTERS = csv.field_size_limit()
_MOST_JSON_BYTES = 1 << 20  # longer ones take too much memory of DuckDB
_LENIENT = r",\s*[}\]]"  # DuckDB permits a comma at the end
#: An id without any of the signs that Python takes for spaces, and without U+FFFD.
_ID = "[^\\x00-\\x20\\x7f-\\xa0\\x{1680}\\x{2000}-\\x{200f}\\x{2028}-\\x{202f}\\x{205f}\\x{3000}\\x{fffd}]+"


class UnfinishedQuoteError(ValueError):
    """A quote is open at the end of a line, so that the rest of the file has to be read as a whole.

    Args:
        rest: yields (number, record) of all lines from the first of a block, whose numbers the source knows.
    """

    def __init__(self, rest: Callable[[Iterable[str]], Iterator[tuple[int, Any]]]):
        self.rest = rest


class Plain(ABC):
    """Reader of the lines of a block.

    A block is a table of Arrow with one row per line (or row of a table), and its number in the column `number`.
    """

    def known(self, block: pa.Table) -> pa.Table:
        """Return the columns of a block whose types DuckDB knows."""
        return block

    @abstractmethod
    def query(self, block: pa.Table) -> str:
        """Return SQL that reads the plain lines of the table `block`.

        Its columns are number; user and item as text; time as text; seconds, the time as DOUBLE, or NULL if it is not
        a number; and rating as DOUBLE. A NULL in any other column means that the line is not plain.
        """

    @abstractmethod
    def records(self, block: pa.Table) -> Iterator[tuple[int, Any]]:
        """Yield (number, record for the parser of the format, or an error) of the lines of a block that are not plain.

        Raises:
            UnfinishedQuoteError: if a record does not end with its line.
        """


def plain_rows(plain: Plain, block: pa.Table, numbers: bool) -> str:
    """Return SQL that reads the plain lines of the table `block`.

    Its columns are number; user and item as text; seconds, the time, or NULL where it is not a number; time, the text
    of these; and rating.

    Args:
        plain: the reader.
        block: the table.
        numbers: whether times may be numbers; otherwise all are text.
    """
    usable = f"coalesce(abs(seconds) < {MOST_SECONDS}, false)" if numbers else "false"
    return f"""
        SELECT number, "user", item, CASE WHEN usable THEN seconds END AS seconds, CASE WHEN NOT usable THEN "time" END
        AS "time", rating FROM (
            SELECT *, {usable} AS usable FROM ({plain.query(block)})
        ) WHERE regexp_full_match("user", '{_ID}') AND regexp_full_match(item, '{_ID}')
            AND (usable OR "time" IS NOT NULL) AND rating IS NOT NULL
    """


class JsonLines(Plain):
    """One JSON object per line.

    Args:
        names: keys of user, item, time and rating; `None`: 0.
    """

    def __init__(self, *names: str | None):
        self._names = [name for name in names if name is not None]
        self._user, self._item, self._time, self._rating = (
            None if name is None else f"found[{self._names.index(name) + 1}]" for name in names
        )

    def query(self, block: pa.Table) -> str:
        # Of several equal keys, the json module takes the last and DuckDB the first.
        keys = f"len(list_filter(json_keys(line), lambda key: key IN ({', '.join(map(text_literal, self._names))})))"
        pointers = ", ".join(text_literal("/" + name.replace("~", "~0").replace("/", "~1")) for name in self._names)
        return f"""
            SELECT number, {_json_id(self._user)} AS user, {_json_id(self._item)} AS item, time, {_number("time")} AS
            seconds, {_number("rating")} AS rating FROM (
                SELECT number, found, {_json_number(self._time)} AS time, {_json_number(self._rating)} AS rating FROM (
                    SELECT number, json_extract(line, [{pointers}])::VARCHAR[] AS found FROM (
                        SELECT number, line FROM block WHERE strlen(line) <= {_MOST_JSON_BYTES}
                            AND starts_with(line, '{{') AND json_valid(line) AND NOT regexp_matches(line, '{_LENIENT}')
                    ) WHERE {keys} = {len(set(self._names))}
                )
            )
        """

    def records(self, block: pa.Table) -> Iterator[tuple[int, str]]:
        for number, line in _lines(block):
            line = line.rstrip("\r\n")
            if line and not line.isspace():
                yield number, line


class Delimited(Plain):
    """Fields separated by a sign.

    Args:
        delimiter: the sign.
        places: positions of user, item, time and rating; `None`: 0.
        width: number of fields.
        most: maximum number of fields; those beyond `width` are ignored.
        quoted: whether fields may be in quotes.
        rest: reader of rows from lines, which is used from a quote on that does not end with its line.
    """

    def __init__(
        self,
        delimiter: str,
        places: Iterable[int | None],
        width: int,
        most: int,
        quoted: bool,
        rest: Callable[[Iterable[str]], Iterator],
    ):
        self._delimiter, self._quoted = delimiter, quoted
        self._width, self._most, self._rest = width, most, rest
        self._user, self._item, self._time, self._rating = (
            "'0'" if place is None else f"fields[{place + 1}]" for place in places
        )

    def query(self, block: pa.Table) -> str:
        line, delimiter = "line", text_literal(self._delimiter)
        if self._quoted:
            field = f'("[^"{self._delimiter}]*"|[^"{self._delimiter}]*)'
            whole = text_literal(f"{field}([{self._delimiter}]{field})*")
            line = f"""CASE WHEN NOT contains(line, '"') THEN line
                WHEN regexp_full_match(line, {whole}) THEN replace(line, '"', '') END"""
        return f"""
            SELECT number, trim({self._user}) AS user, trim({self._item}) AS item, {self._time} AS time,
            {_number(self._time)} AS seconds, {_number(self._rating)} AS rating FROM (
                SELECT number, string_split({line}, {delimiter}) AS fields FROM (
                    SELECT number, regexp_replace(line, '\\r?\\n$', '') AS line FROM block
                ) WHERE strlen(line) <= {_MOST_FIELD_CHARACTERS} AND NOT contains(line, chr(13))
            ) WHERE len(fields) BETWEEN {self._width} AND {self._most}
        """

    def records(self, block: pa.Table) -> Iterator[tuple[int, list[str]]]:
        quoting = csv.QUOTE_MINIMAL if self._quoted else csv.QUOTE_NONE
        for number, line in _lines(block):
            if len(self._delimiter) > 1:
                fields = line.rstrip("\r\n").split(self._delimiter)
            else:
                try:
                    (fields,) = csv.reader([line], delimiter=self._delimiter, quoting=quoting, strict=True)
                except csv.Error as error:
                    if "unexpected end of data" in str(error):
                        raise UnfinishedQuoteError(self._rest) from None
                    yield number, ValueError(str(error))
                    continue
            if len(fields) > 1 or (fields and fields[0].strip()):
                yield number, fields


class Typed(Plain):
    """Rows of a table of Arrow.

    Args:
        names: its columns, of user, item, time and rating; those that are missing are 0.
    """

    def __init__(self, names: Iterable[str]):
        self._names = set(names)

    def known(self, block: pa.Table) -> pa.Table:
        return block.select([field.name for field in block.schema if is_text(field.type) or _is_number(field.type)])

    def query(self, block: pa.Table) -> str:
        user, item = (_typed_id(block.schema, name) for name in ("user", "item"))
        seconds, rating = (_typed_number(block.schema, name, name not in self._names) for name in ("time", "rating"))
        text = "time" in block.column_names and is_text(block.schema.field("time").type)
        time = "time::VARCHAR" if text else "NULL::VARCHAR"
        return f"""
            SELECT number, {user} AS user, {item} AS item, {time} AS time, {seconds} AS seconds, {rating} AS rating
            FROM block
        """

    def records(self, block: pa.Table) -> Iterator[tuple[int, tuple]]:
        columns = [
            block[name].to_pylist() if name in block.column_names else [0.0] * len(block)
            for name in ("user", "item", "time", "rating")
        ]
        yield from zip(block["number"].to_pylist(), zip(*columns, strict=True), strict=True)


def _lines(block: pa.Table) -> Iterator[tuple[int, str]]:
    return zip(block["number"].to_pylist(), block["line"].to_pylist(), strict=True)


def _number(text: str) -> str:
    """A number as `float` reads it. DuckDB takes "+-1" for one."""
    return f"CASE WHEN NOT contains({text}, '+-') THEN try_cast({text} AS DOUBLE) END"


def _json_text(raw: str) -> str:
    """The condition that a value of JSON is a text without escapes, and the text."""
    return f"WHEN starts_with({raw}, '\"') AND NOT contains({raw}, '\\') THEN substring({raw}, 2, length({raw}) - 2)"


def _json_id(raw: str) -> str:
    return f"CASE {_json_text(raw)} WHEN regexp_full_match({raw}, '0|-?[1-9][0-9]{{0,17}}') THEN {raw} END"


def _json_number(raw: str | None) -> str:
    if raw is None:
        return "'0'"
    return f"CASE {_json_text(raw)} WHEN regexp_matches({raw}, '^[-0-9]') THEN {raw} END"


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind)


def _typed_id(schema: pa.Schema, name: str) -> str:
    """SQL of a column of ids; NULL if its type is unknown."""
    known = name in schema.names and not pa.types.is_floating(schema.field(name).type)
    return f"{name}::VARCHAR" if known else "NULL::VARCHAR"


def _typed_number(schema: pa.Schema, name: str, missing: bool) -> str:
    """SQL of a column of numbers; 0 if it is `missing`, NULL if its type is unknown."""
    if missing:
        return "0::DOUBLE"
    if name not in schema.names:
        return "NULL::DOUBLE"
    return _number(f"{name}::VARCHAR") if is_text(schema.field(name).type) else f"{name}::DOUBLE"
