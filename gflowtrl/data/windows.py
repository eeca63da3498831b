"""Rows that are positions of one window: what their prompts hold, and which of them are computed together.

A user's rows are `[a] -> b`, `[a, b] -> c`, `[a, b, c] -> d`. Every history and its target is the beginning of the
next history, and a causal model that reads the longest of them has computed them all. Sequences that are too long for
a prompt are cut into windows (`user_windows`), the same for every row of a window, so that this stays true.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import COUNT, check_number

from .interactions import ranges


CHUNK = 50_000  # rows that are read together
ITEMS_AT_ONCE = 5_000_000  # of their histories that are looked at together


@dataclass(frozen=True, eq=False)
class Windows:
    """The prompts of a batch of B rows as beginnings of U sequences of items.

    Attributes:
        items: of each of the U sequences; what is behind the longest prompt is hidden from all.
        trunk: `(B,)` the sequence that each row's prompt begins.
        seen: `(B,)` how many of its items the prompt holds.
    """

    items: list[list[Item]]
    trunk: Tensor
    seen: Tensor

    @classmethod
    def pack(
        cls, histories: Sequence[Sequence[Item]], targets: Sequence[Item], max_rows: int | None = None
    ) -> Windows:
        """As few sequences as can be, of prompts and their targets.

        Args:
            histories: what each row's prompt holds.
            targets: the item that follows each.
            max_rows: sequences that more rows begin are taken several times, each for a part of them.
        """
        # Equal items must sort together and nothing else is asked of the order, so any numbering of the items will do.
        numbers: dict[Item, int] = {}
        rows = [[*history, target] for history, target in zip(histories, targets, strict=True)]
        keys = [tuple(numbers.setdefault(item, len(numbers)) for item in row) for row in rows]
        groups: list[list[int]] = []
        # What has s as a prefix follows s at once in this order: going backwards the last one is the only candidate.
        for row in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):
            if groups and keys[groups[-1][0]][: len(keys[row])] == keys[row]:
                groups[-1].append(row)
            else:
                groups.append([row])
        if max_rows is not None:
            groups = [part for group in groups for part in _evenly(group, max_rows)]
        trunk = torch.empty(len(rows), dtype=torch.long)
        for number, group in enumerate(groups):
            trunk[group] = number
        return cls([rows[group[0]] for group in groups], trunk, torch.tensor([len(history) for history in histories]))

    @classmethod
    def separate(cls, histories: Sequence[Sequence[Item]]) -> Windows:
        """Each prompt by itself."""
        items = [list(history) for history in histories]
        return cls(items, torch.arange(len(items)), torch.tensor([len(history) for history in items]))

    @property
    def prompts(self) -> list[list[Item]]:
        """The longest prompt that begins each of the U sequences."""
        longest = torch.zeros(len(self.items), dtype=torch.long).scatter_reduce_(0, self.trunk, self.seen, "amax")
        return [items[:seen] for items, seen in zip(self.items, longest.tolist(), strict=True)]

    @property
    def histories(self) -> list[list[Item]]:
        """The items of each row's prompt."""
        return [self.items[u][:seen] for u, seen in zip(self.trunk.tolist(), self.seen.tolist(), strict=True)]

    def rows(self, rows: slice) -> Windows:
        """Those of some rows; sequences that none of them begins are left out."""
        used, trunk = self.trunk[rows].unique(return_inverse=True)
        return Windows([self.items[u] for u in used.tolist()], trunk, self.seen[rows])


@dataclass(frozen=True, eq=False)
class RowWindows:
    """What the prompt of each row of a data set holds: its window, a function of the data set alone.

    Attributes:
        row_ids: `(rows,)` ascending.
        seen: `(rows,)` how many items, the last ones of its history, the prompt of each of `row_ids` holds.
        groups: the rows of each window by their number, the shortest prompt first.
        lengths: `(groups,)` items of the longest prompt of each.
        cut: how many rows have a longer history than their prompt holds.
        least_of_cut: the fewest items that a prompt of those rows holds; 0 where there are none.
    """

    row_ids: Tensor
    seen: Tensor
    groups: list[list[int]]
    lengths: list[int]
    cut: int
    least_of_cut: int

    @classmethod
    def of(cls, rows: Dataset, items: Sequence[Item], max_items: int) -> RowWindows:
        """Find sequences of rows, and cut them as `user_windows` cuts them.

        Two rows belong to one sequence if history and target of the one begin the history of the other, and both have
        the same `user` where the data set has that column. Rows need not be complete, nor in any order.

        Args:
            rows: with the columns `row_id`, `history`, `target`.
            items: the catalog's, all that occur.
            max_items: the most that a prompt may hold.
        """
        lengths, parents = _parents(rows, items)
        sequence, whole = _sequences(lengths, parents)
        starts = window_starts(whole[sequence], lengths, max_items)
        seen = lengths - starts
        order = np.lexsort((lengths, starts, sequence))
        changed = (np.diff(sequence[order]) != 0) | (np.diff(starts[order]) != 0)
        groups = [group.tolist() for group in np.split(order, np.flatnonzero(changed) + 1)]
        return cls._made(rows, lengths, seen, groups)

    @classmethod
    def separate(cls, rows: Dataset, max_items: int) -> RowWindows:
        """Every row by itself, its prompt the last `max_items` of its history."""
        lengths = history_lengths(rows).numpy()
        seen = np.minimum(lengths, max_items)
        return cls._made(rows, lengths, seen, [[row] for row in range(len(seen))])

    @classmethod
    def _made(cls, rows: Dataset, lengths: np.ndarray, seen: np.ndarray, groups: list[list[int]]) -> RowWindows:
        row_ids, order = torch.tensor(rows["row_id"][:]).sort()
        cut = seen[seen < lengths]
        longest = [int(seen[group[-1]]) for group in groups]
        least = int(cut.min()) if len(cut) else 0
        return cls(row_ids, torch.from_numpy(seen)[order], groups, longest, len(cut), least)

    def seen_by(self, row_ids: Sequence[int]) -> list[int]:
        """How many items the prompts of these rows hold.

        Raises:
            KeyError: a row that is not in the data set.
        """
        wanted = torch.tensor(row_ids)
        place = torch.searchsorted(self.row_ids, wanted).clamp(max=len(self.row_ids) - 1)
        if not torch.equal(self.row_ids[place], wanted):
            raise KeyError(f"There is no row {int(wanted[self.row_ids[place] != wanted][0])} in the training data.")
        return self.seen[place].tolist()


def _evenly(group: list[int], max_size: int) -> list[list[int]]:
    pieces = math.ceil(len(group) / max_size)
    size = math.ceil(len(group) / pieces)
    return [group[start : start + size] for start in range(0, len(group), size)]


def window_starts(lengths: np.ndarray, positions: np.ndarray, max_items: int) -> np.ndarray:
    """Where the window of each target begins in its sequence, as `user_windows` cuts it, elementwise.

    Args:
        lengths: of the sequences.
        positions: of the targets in them, >= 1.
        max_items: the most that a prompt may hold, >= 1.
    """
    check_number("max_items", max_items, COUNT)
    stride = max_items - max_items // 2
    number = (positions - max_items - 1) // stride + 1  # of the window, <= 0 in the first one
    ends = np.minimum(max_items + 1 + number * stride, lengths)
    return np.where(number <= 0, 0, (ends - max_items - 1).clip(min=0))


def history_lengths(rows: Dataset) -> Tensor:
    """Number of items of each row's history: `(rows,)`."""
    return torch.tensor([len(history) for history in rows["history"]])


def _parents(rows: Dataset, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Number of items of each row's history, and the row whose history and target are the longest beginning of it
    (-1: none).

    Beginnings are compared by hashes of 64 bits, sums of a random number for each item times one for its place;
    whoever computes rows together compares them again.
    """
    random, count = np.random.default_rng(0), len(rows)
    of_item = _odd(random, len(items))
    parts = (_column(rows, "history", start, start + CHUNK) for start in range(0, count, CHUNK))
    lengths = np.concatenate([pc.list_value_length(part).to_numpy() for part in parts]).astype(np.int64)
    of_place = _odd(random, 1 + int(lengths.max()))
    of_user = np.zeros(count, np.uint64)
    if "user" in rows.column_names:
        numbers: dict[str, int] = {}  # of any type that Arrow has; none is a user as well
        users = np.array([numbers.setdefault(repr(user), len(numbers)) for user in rows["user"]])
        of_user = _odd(random, len(numbers))[users]
    whole, parents = np.zeros(count, np.uint64), np.full(count, -1)

    def beginnings(part: slice, counts: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and hashes of all beginnings of their histories."""
        starts = counts.cumsum() - counts
        row = np.repeat(np.arange(part.start, part.stop), counts)
        terms = of_item[places] * of_place[ranges(np.zeros_like(counts), counts)]
        sums = terms.cumsum()
        return row, sums - np.repeat(sums[starts] - terms[starts], counts) + of_user[row]

    for part, counts, places in _histories(rows, items):
        targets = _places(_column(rows, "target", part.start, part.stop), items)
        ends = beginnings(part, counts, places)[1][counts.cumsum() - 1]
        whole[part] = ends + of_item[targets] * of_place[counts]
    known = whole.argsort(kind="stable")
    ordered = whole[known]
    for part, counts, places in _histories(rows, items):
        row, hashes = beginnings(part, counts, places)
        place = np.minimum(np.searchsorted(ordered, hashes), count - 1)
        found = np.flatnonzero(ordered[place] == hashes)
        parents[row[found]] = known[place[found]]  # of several, the last one stays: the longest
    return lengths, parents


def _sequences(lengths: np.ndarray, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sequence that each row is of, `(rows,)`, and the items of each sequence, targets included.

    Every row is of one sequence: that of the longest row that it begins, where several begin alike.
    """
    sequence, whole = np.full(len(lengths), -1), []
    for row in np.argsort(-lengths, kind="stable").tolist():
        if sequence[row] >= 0:
            continue
        whole.append(lengths[row] + 1)
        while row >= 0 and sequence[row] < 0:
            sequence[row] = len(whole) - 1
            row = parents[row]
    return sequence, np.array(whole)


def _histories(rows: Dataset, items: Sequence[Item]) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Parts of the rows, the lengths of their histories, and the places of all their items in `items`, end to end."""
    for start in range(0, len(rows), CHUNK):
        part = slice(start, min(start + CHUNK, len(rows)))
        histories = _column(rows, "history", part.start, part.stop)
        lengths = pc.list_value_length(histories).to_numpy()
        number = lengths.cumsum() // ITEMS_AT_ONCE
        ends = [*(np.flatnonzero(np.diff(number)) + 1).tolist(), len(lengths)]
        for begin, end in itertools.pairwise([0, *ends]):
            some = pc.list_flatten(histories.slice(begin, end - begin))
            yield slice(part.start + begin, part.start + end), lengths[begin:end], _places(some, items)


def _column(rows: Dataset, name: str, start: int, stop: int) -> pa.Array:
    return rows.select_columns([name]).with_format("arrow")[start:stop][name].combine_chunks()


def _places(values: pa.Array, items: Sequence[Item]) -> np.ndarray:
    known = pa.array(items)
    return pc.index_in(values.cast(known.type), known).to_numpy(zero_copy_only=False)


def _odd(random: np.random.Generator, count: int) -> np.ndarray:
    return random.integers(2**63, size=count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
