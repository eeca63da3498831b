"""Interaction logs as three compact arrays: 16 bytes per interaction, plus each user and item id once."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Literal

import numpy as np

from gflowtrl.catalog import Item

from ..interactions import InteractionData, flatten
from .format import Parsed
from .source import MALFORMED, Source


Duplicates = Literal["first", "last", "keep"]

UNREADABLE = "\ufffd"  # replacement of bytes that cannot be decoded
_MOST_SECONDS = 1e300
_MOST_DIGITS = 18  # more digits may not fit into 64 bits


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
        """Keep the chosen interactions, bool (T,), of a sorted log."""
        self.users = self.users[chosen]
        self.items = self.items[chosen]
        self.times = self.times[chosen]

    def sort_by_time(self) -> float:
        """Sort by user, then by time, oldest first; interactions with equal times keep the order of the file.

        Returns:
            The share of adjacent interactions of a user that have the same time.
        """
        order = np.lexsort((self.times, self.users))
        self.users = self.users[order]
        self.items = self.items[order]
        self.times = times = self.times[order]
        adjacent = self.users[1:] == self.users[:-1]
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


def read_log(files: Iterable[tuple[Source, Parsed]], min_rating: float | None) -> tuple[InteractionLog, int]:
    """Read the interactions of all files, except those rated below `min_rating`; return them and the number left out.

    A file is taken from the iterator, and thus opened, after the file before it has been read.
    """
    users, items, times = array("i"), array("i"), array("d")
    user_numbers, item_numbers = _Numbers(), _Numbers()
    below, paths = 0, []
    for source, parsed in files:
        line = None
        for line, record in parsed.records:
            try:
                user, item, time, rating = parsed.parse(record)
                if min_rating is not None and not float(rating) >= min_rating:
                    below += 1
                    continue
                when, user_number, item_number = parse_time(time), user_numbers[user], item_numbers[item]
            except MALFORMED as error:
                source.reject(line, error)
                continue
            users.append(user_number)
            items.append(item_number)
            times.append(when)
        source.finish(line)
        paths.append(str(source.path))
    if not users:
        limit = "" if min_rating is None else f" with a rating of {min_rating:g} or more; choose a lower min_rating"
        raise ValueError(f"{', '.join(paths)}: there is no interaction{limit}.")
    log = InteractionLog(
        users=np.frombuffer(users, np.int32),
        items=np.frombuffer(items, np.int32),
        times=np.frombuffer(times, np.float64),
        user_names=_typed(list(user_numbers)),
        item_names=_typed(list(item_numbers)),
    )
    return log, below


def log_of(data: InteractionData) -> InteractionLog:
    """Convert the sequences of `data`, which are in chronological order, to a log."""
    items, offsets = flatten(data.sequences, data.items)
    users = np.repeat(np.arange(len(data.users)), np.diff(offsets))
    times = np.zeros(len(items)) if data.times is None else np.array(list(chain.from_iterable(data.times)), np.float64)
    return InteractionLog(users, items, times, data.users, data.items)


def sequences_of(log: InteractionLog) -> tuple[list[Item], list[list[Item]], list[list[float]]]:
    """Return the users, sorted by id, their item sequences and their times, from a log sorted by user.

    If all times are whole numbers, they are returned as such.
    """
    starts = np.flatnonzero(np.diff(log.users, prepend=-1))
    stops = np.append(starts[1:], len(log))
    name_of_item = log.item_names.__getitem__
    whole = bool((np.abs(log.times) < 2**53).all() and (log.times == np.floor(log.times)).all())
    times = log.times.astype(np.int64) if whole else log.times
    by_user = {
        log.user_names[log.users[start]]: (
            list(map(name_of_item, log.items[start:stop].tolist())),
            times[start:stop].tolist(),
        )
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
    }
    users = sorted(by_user)
    return users, [by_user[user][0] for user in users], [by_user[user][1] for user in users]


def identifier(value: Any) -> str:
    """Return a user or item id as text, without surrounding whitespace. Raise a ValueError if it is invalid."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not (name := value.strip()):
        raise ValueError(f"the id {value!r} is neither text nor a whole number")
    if UNREADABLE.encode() in value.encode():  # encode() fails for half characters, which JSON can contain
        raise ValueError(f"the id {value!r} contains bytes that are not text")
    return name


class _Numbers(dict):
    """Map ids to consecutive indices, adding new ids. A whole number and its text are the same id."""

    def __missing__(self, value: Any) -> int:
        name = identifier(value)
        if name is not value:  # strip() returns the same object if there is nothing to strip
            return self[name]
        self[name] = number = len(self)
        return number


def parse_time(time: Any) -> float:
    """Return a time as a number: the number itself, or the seconds of ISO 8601 text. Raise a ValueError otherwise."""
    try:
        seconds = float(time)
    except ValueError:
        when = _date(time)
        seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    if not -_MOST_SECONDS < seconds < _MOST_SECONDS:
        raise ValueError(f"the time {time!r} is not a valid number")
    return seconds


def _date(time: Any) -> datetime:
    try:
        return datetime.fromisoformat(time.strip())
    except (TypeError, ValueError):
        raise ValueError(f"the time {time!r} is neither a number nor ISO 8601 text") from None


def _typed(names: Sequence[str]) -> list[Item]:
    """Convert ids to whole numbers if all are canonical decimal numbers ("007" and "7" remain two ids)."""
    if all(_is_plain_number(name) for name in names):
        return [int(name) for name in names]
    return list(names)


def _is_plain_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) <= _MOST_DIGITS and (name[0] != "0" or name == "0")
