"""Interaction logs as three compact arrays: 16 bytes per interaction, plus each user and item id once."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice
from operator import gt, itemgetter
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa

from gflowtrl.catalog import Item

from ..database import Database
from ..interactions import InteractionData, flat_times, flatten
from ..sequences import Sequences
from .format import Parsed
from .plain import MOST_SECONDS, UNREADABLE, UnfinishedQuoteError, plain_rows
from .source import MALFORMED, Source, read_ahead


Duplicates = Literal["first", "last", "keep"]

MAX_MEMORY = "768MiB"
_BLOCK_ROWS = 1 << 17
_SCHEMA = pa.schema({"number": pa.int64(), "user": pa.string(), "item": pa.string(), "time": pa.float64()})


@dataclass
class InteractionLog:
    """Users, items and times of T interactions. Methods change the log in place, to avoid copies of the arrays.

    Attributes:
        users: user indices, int32 (T,).
        items: item indices, int32 (T,).
        times: float64 (T,), in the unit of the file.
        user_names: user id of each index; may include ids without interactions.
        item_names: item id of each index; may include ids without interactions.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    user_names: list[Item]
    item_names: list[Item]

    def __len__(self) -> int:
        return len(self.users)

    def counts(self) -> dict[str, int]:
        """Return the numbers of interactions, users and items."""
        users, items = (int(np.count_nonzero(np.bincount(numbers))) for numbers in (self.users, self.items))
        return {"interactions": len(self), "users": users, "items": items}

    def keep(self, chosen: np.ndarray) -> None:
        """Keep the chosen interactions, bool (T,) or indices."""
        self.users = self.users[chosen]
        self.items = self.items[chosen]
        self.times = self.times[chosen]

    def sort_by_time(self) -> float:
        """Sort by user, then by time, oldest first; interactions with equal times keep the order of the file.

        Returns:
            The share of adjacent interactions of a user that have the same time.
        """
        adjacent = self.users[1:] == self.users[:-1]
        if ((self.users[1:] < self.users[:-1]) | (adjacent & (self.times[1:] < self.times[:-1]))).any():
            self.keep(np.lexsort((self.times, self.users)))
            adjacent = self.users[1:] == self.users[:-1]
        times = self.times
        tied = adjacent & (times[1:] == times[:-1])
        return float(tied.sum() / max(1, adjacent.sum()))

    def drop_duplicates(self, which: Duplicates) -> int:
        """Keep the first or the last interaction of a user with an item in a sorted log, or all (`"keep"`).

        Returns:
            The number of duplicates, interactions beyond the first of each user with each item.
        """
        pairs = self.users.astype(np.int64) * len(self.item_names) + self.items
        order = np.argsort(pairs, kind="stable")
        pairs = pairs[order]
        repeated = pairs[1:] == pairs[:-1]
        if which != "keep":
            stays = np.ones(len(self), dtype=bool)
            stays[(order[1:] if which == "first" else order[:-1])[repeated]] = False
            self.keep(stays)
        return int(repeated.sum())


def read_log(
    files: Iterable[tuple[Source, Parsed]], min_rating: float | None, max_memory: str = MAX_MEMORY
) -> tuple[InteractionLog, int]:
    """Read the interactions of all files, except those rated below `min_rating`; return them and the number left out.

    The log is sorted as by `InteractionLog.sort_by_time`, its ids are sorted, too. A file is taken from the iterator,
    and thus opened, after the file before it has been read.
    """
    paths = []
    try:
        with Database(max_memory) as database:
            reader = _Reader(database, min_rating)
            for source, parsed in files:
                paths.append(str(source.path))
                reader.read(source, parsed)
            log = reader.log()
    except duckdb.Error as error:
        name, reason = ", ".join(paths[-1:]) or "The log", str(error).split("\n")[0]
        if not isinstance(error, duckdb.OutOfMemoryException | duckdb.IOException):
            raise ValueError(f"{name} cannot be read by DuckDB ({reason}). Check the file and its format.") from None
        raise ValueError(
            f"{name} cannot be read with {max_memory} of memory and temporary files in {tempfile.gettempdir()} "
            f"({reason}). Raise max_memory, or set TMPDIR to a folder with more space."
        ) from None
    if not len(log):
        limit = "" if min_rating is None else f" with a rating of {min_rating:g} or more; choose a lower min_rating"
        raise ValueError(f"{', '.join(paths)}: there is no interaction{limit}.")
    return log, reader.below


class _Reader:
    """Collects the interactions of all files in a table of DuckDB, which moves to the disk if it becomes too large."""

    def __init__(self, database: Database, min_rating: float | None):
        self.below = 0
        self._tables, self._database = database, database.connection
        self._min_rating, self._files = min_rating, 0
        self._parse_time = parse_time
        self._database.execute(
            'CREATE TABLE log (file INTEGER, number BIGINT, "user" VARCHAR, item VARCHAR, "time" DOUBLE)'
        )

    def read(self, source: Source, parsed: Parsed) -> None:
        """Read a file."""
        self._files += 1
        self._parse_time = partial(parse_time, format=parsed.time_format)
        if parsed.plain is None:
            last = self._read_records(source, parsed.parse, parsed.records)
        else:
            with read_ahead(parsed.records) as blocks:
                last = self._read_blocks(source, parsed, blocks)
        source.finish(last)

    def log(self) -> InteractionLog:
        """Return all interactions."""
        names = [self._name_table(column) for column in ("user", "item")]
        found = self._database.sql(
            'SELECT user_names.code AS users, item_names.code AS items, "time" AS times FROM log '
            'JOIN user_names ON log."user" = user_names.name JOIN item_names ON log.item = item_names.name '
            # Several interactions of a user may be in one line; they were inserted in their order.
            "ORDER BY users, times, file, number, log.rowid"
        ).fetchnumpy()
        return InteractionLog(found["users"], found["items"], found["times"], *names)

    def _name_table(self, column: str) -> list[Item]:
        """Number the ids of a column in their order, and return them: whole numbers if all are such."""
        self._database.execute(f'CREATE TABLE {column}_names AS SELECT DISTINCT "{column}" AS name FROM log')
        # "007" and "7" remain two ids; numbers of more digits may not fit into 64 bits.
        numeric = f"SELECT bool_and(regexp_full_match(name, '0|[1-9][0-9]{{0,17}}')) FROM {column}_names"
        kind = "name::BIGINT" if self._database.execute(numeric).fetchall()[0][0] else "name"
        self._database.execute(
            f"CREATE OR REPLACE TABLE {column}_names AS SELECT name, {kind} AS id, "
            f"(row_number() OVER (ORDER BY {kind}) - 1)::INTEGER AS code FROM {column}_names"
        )
        ids = self._database.sql(f"SELECT id FROM {column}_names ORDER BY code")
        return ids.to_arrow_table()["id"].to_pylist()

    def _read_blocks(self, source: Source, parsed: Parsed, blocks: Iterator[pa.Table]) -> int | None:
        """Read all blocks, and return the number of the last record, or None."""
        last = None
        for block in filter(len, blocks):  # a table may have empty chunks
            try:
                last = self._read_block(source, parsed, block) or last
            except UnfinishedQuoteError as quote:
                source.lines = block["number"][0].as_py() - 1
                lines = chain.from_iterable(part["line"].to_pylist() for part in chain([block], blocks))
                last = self._read_records(source, parsed.parse, quote.rest(lines=lines)) or last
        return last

    def _read_block(self, source: Source, parsed: Parsed, block: pa.Table) -> int | None:
        """Read a block, and return the number of its last record, or None."""
        known = parsed.plain.known(block)
        least = self._min_rating
        enough = "true" if least is None else f"rating >= {float(least)!r}::DOUBLE AND NOT isnan(rating)"
        rows = plain_rows(parsed.plain, known, parsed.time_format is None)
        with self._tables.view("block", known):
            self._database.execute(f"CREATE OR REPLACE TEMP TABLE found AS SELECT *, {enough} AS enough FROM ({rows})")
        count, enough, timed, last = self._database.execute(
            "SELECT count(*), count(*) FILTER (enough), count(*) FILTER (enough AND seconds IS NOT NULL), max(number) "
            "FROM found"
        ).fetchall()[0]
        records = []
        if count < len(block):
            others = np.ones(len(block), dtype=bool)
            plain = self._database.sql("SELECT number FROM found").fetchnumpy()["number"]
            others[plain - block["number"][0].as_py()] = False
            records = list(parsed.plain.records(block.filter(pa.array(others))))
        source.lines = block["number"][-1].as_py()
        self.below += count - enough
        self._database.execute(
            f'INSERT INTO log SELECT {self._files}, number, "user", item, seconds FROM found WHERE enough AND seconds '
            "IS NOT NULL"
        )
        if timed < enough:
            parsed_text = self._database.execute(
                'SELECT number, "user", item, "time" FROM found WHERE enough AND seconds IS NULL ORDER BY number'
            )
            records = self._with_times(parsed_text.fetchall(), records)
        self._insert(self._parsed(source, parsed.parse, records))
        return max((number for number in (last, *(number for number, _ in records[-1:])) if number), default=None)

    def _with_times(self, rows: list[tuple], records: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """Insert plain lines whose times are text, and return `records` with the errors of those that are invalid."""
        known: dict[str, float | ValueError] = {}
        for text in {text for *_, text in rows}:
            try:
                known[text] = self._parse_time(text)
            except MALFORMED as error:
                known[text] = ValueError(str(error))
        valid = [(*row[:3], known[row[3]]) for row in rows if not isinstance(known[row[3]], ValueError)]
        self._insert(valid)
        wrong = [(row[0], known[row[3]]) for row in rows if isinstance(known[row[3]], ValueError)]
        return sorted([*records, *wrong], key=itemgetter(0))

    def _insert(self, rows: Iterable[tuple[int, str, str, float]]) -> None:
        """Insert (line number, user, item, time)."""
        rows = iter(rows)
        while part := list(islice(rows, _BLOCK_ROWS)):
            columns = dict(zip(("number", "user", "item", "time"), map(list, zip(*part, strict=True)), strict=True))
            with self._tables.view("part", pa.table(columns, _SCHEMA)):
                self._database.execute(f"INSERT INTO log SELECT {self._files}, * FROM part")

    def _read_records(self, source: Source, parse: Callable[[Any], tuple], records: Iterable) -> int | None:
        """Read all records, one at a time, and return the number of the last one, or None."""
        last = None

        def counted() -> Iterator[tuple[int, Any]]:
            nonlocal last
            for record in records:
                last = record[0]
                yield record

        self._insert(self._parsed(source, parse, counted()))
        return last

    def _parsed(self, source: Source, parse: Callable[[Any], tuple], records: Iterable) -> Iterator[tuple]:
        """Yield (number, user, item, time) of the records that count; errors among them are malformed."""
        for number, record in records:
            try:
                if isinstance(record, ValueError):
                    raise record
                user, item, time, rating = parse(record)
                if self._min_rating is not None and not float(rating) >= self._min_rating:
                    self.below += 1
                    continue
                when, user, item = self._parse_time(time), identifier(user), identifier(item)
            except MALFORMED as error:
                source.reject(number, error)
                continue
            yield number, user, item, when


def log_of(data: InteractionData) -> InteractionLog:
    """Convert the sequences of `data`, which are in chronological order, to a log."""
    items, offsets = flatten(data.sequences, data.items)
    users = np.repeat(np.arange(len(data.users)), np.diff(offsets))
    times = np.zeros(len(items)) if data.times is None else flat_times(data.times).astype(np.float64)
    return InteractionLog(users, items, times, data.users, data.items)


def data_of(log: InteractionLog, name: str) -> InteractionData:
    """Return the data of a log that is sorted by user. Users and items are sorted by their ids.

    If all times are whole numbers, they are returned as such; if all are equal, the data have no times.
    """
    starts = np.flatnonzero(np.diff(log.users, prepend=-1))
    users = [log.user_names[number] for number in log.users[starts].tolist()]
    used = np.bincount(log.items, minlength=len(log.item_names)) > 0
    names = [log.item_names[number] for number in np.flatnonzero(used).tolist()]
    times = log.times
    if (np.abs(times) < 2**53).all() and (times == np.floor(times)).all():
        times = times.astype(np.int64)
    offsets = np.append(starts, len(log))
    sequences = Sequences.with_sorted_names((np.cumsum(used) - 1)[log.items], offsets, names)
    kept_times, items = Sequences(times, offsets), sequences.names
    if any(map(gt, users, users[1:])):
        order = sorted(range(len(users)), key=users.__getitem__)
        users, sequences, kept_times = (
            [users[row] for row in order], sequences.take(np.array(order)), kept_times.take(np.array(order))
        )  # fmt: skip
    has_times = bool(times.min() < times.max())
    return InteractionData(name, users, sequences, items, times=kept_times if has_times else None)


def identifier(value: Any) -> str:
    """Return a user or item id as text, without surrounding whitespace. Raise a ValueError if it is invalid."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not (name := value.strip()):
        raise ValueError(f"the id {value!r} is neither text nor a whole number")
    if UNREADABLE.encode() in value.encode():  # encode() fails for half characters, which JSON can contain
        raise ValueError(f"the id {value!r} contains bytes that are not text")
    return name


def parse_time(time: Any, format: str | None = None) -> float:
    """Return a time as a number: the number itself, or the seconds of text in ISO 8601 or a format of `strptime`.

    Raises:
        ValueError: it is another value.
    """
    try:
        seconds = _seconds(datetime.strptime(str(time).strip(), format)) if format else float(time)
    except ValueError:
        if format:
            raise ValueError(f"the time {time!r} does not have the format {format!r}") from None
        seconds = _seconds(_date(time))
    if not -MOST_SECONDS < seconds < MOST_SECONDS:
        raise ValueError(f"the time {time!r} is not a valid number")
    return seconds


def _seconds(when: datetime) -> float:
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _date(time: Any) -> datetime:
    try:
        return datetime.fromisoformat(time.strip())
    except (TypeError, ValueError):
        raise ValueError(f"the time {time!r} is neither a number nor ISO 8601 text") from None
