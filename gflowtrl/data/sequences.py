"""The item sequences of many users in two arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar, overload

import numpy as np


T = TypeVar("T")
_USERS_AT_ONCE = 1 << 14


class Sequences(Sequence[list[T]]):
    """Many lists that holds two arrays, not a Python object per interaction.

    An element is a new list, so changing it changes nothing here. Two are equal if their lists are equal; a list of
    lists can be equal, too.

    Args:
        values: the concatenated lists `(T,)`: positions in `names`, or the values themselves.
        offsets: where each list begins in `values`, and the end of the last one, `(lists + 1,)`.
        names: what the values stand for, for example the items of a catalog; `None`: the values are the elements.
    """

    def __init__(self, values: np.ndarray, offsets: np.ndarray, names: Sequence[T] | None = None):
        self.values, self.offsets, self.names = values, offsets, names

    @classmethod
    def with_sorted_names(cls, values: np.ndarray, offsets: np.ndarray, names: Sequence[T]) -> Sequences[T]:
        """Return lists whose `names` are sorted, from names in any order."""
        found = sorted(names)
        index = {name: place for place, name in enumerate(found)}
        return cls(np.array([index[name] for name in names], np.int32)[values], offsets, found)

    @property
    def lengths(self) -> np.ndarray:
        """Length of each list, `(lists,)`."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> list[T]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequences[T]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} lists, but number {index} was asked for.")
        index %= len(self)
        return self._named(self.values[self.offsets[index] : self.offsets[index + 1]])

    def __iter__(self) -> Iterator[list[T]]:
        for start in range(0, len(self), _USERS_AT_ONCE):
            offsets = self.offsets[start : start + _USERS_AT_ONCE + 1]
            flat = self._named(self.values[offsets[0] : offsets[-1]])
            for begin, end in pairwise((offsets - offsets[0]).tolist()):
                yield flat[begin:end]

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Sequences | list):
            return NotImplemented
        return len(self) == len(other) and all(own == theirs for own, theirs in zip(self, other, strict=True))

    __hash__ = None

    def __repr__(self) -> str:
        return f"Sequences({len(self)} lists of {len(self.values)} values)"

    def take(self, rows: np.ndarray) -> Sequences[T]:
        """Return the lists with some indices."""
        return self.parts(self.offsets[rows], self.offsets[rows + 1])

    def parts(self, starts: np.ndarray, stops: np.ndarray) -> Sequences[T]:
        """Return the lists that begin and end at positions in `values`, each `(parts,)`."""
        offsets = np.concatenate([[0], np.cumsum(stops - starts, dtype=np.int64)])
        return Sequences(self.values[ranges(starts, stops)], offsets, self.names)

    def _named(self, values: np.ndarray) -> list[T]:
        found = values.tolist()
        return found if self.names is None else list(map(self.names.__getitem__, found))


def ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Concatenate `arange(start, stop)` over all pairs, without a loop."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
