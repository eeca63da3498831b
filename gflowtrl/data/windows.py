"""Windows of item sequences: which items the prompt of each row contains, and which rows are computed together.

A user's rows are `[a] -> b`, `[a, b] -> c`, `[a, b, c] -> d`. Each history with its target is a prefix of the next
history, so a causal model that reads the longest one has computed all of them. Sequences that are too long for a
prompt are cut into windows (`user_windows`), the same for all rows of a window, which preserves this property.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import COUNT, check_number

from .interactions import lengths_of
from .sequences import ranges


CHUNK = 50_000  # rows that are read at a time
ITEMS_AT_ONCE = 5_000_000  # history items that are processed at a time


class Window(NamedTuple):
    """Part of a sequence; the items from position `first_target` on are targets."""

    items: list[Item]
    first_target: int


@dataclass(frozen=True, eq=False)
class Windows:
    """The prompts of a batch of B rows as prefixes of U item sequences.

    Attributes:
        items: items of each of the U sequences; no prompt sees those after the longest prompt.
        trunk: `(B,)` index of the sequence of which each row's prompt is a prefix.
        seen: `(B,)` number of its items that the prompt contains.
    """

    items: list[list[Item]]
    trunk: Tensor
    seen: Tensor

    @classmethod
    def pack(
        cls, histories: Sequence[Sequence[Item]], targets: Sequence[Item], max_rows: int | None = None
    ) -> Windows:
        """Pack prompts and their targets into as few sequences as possible.

        Args:
            histories: items of each row's prompt.
            targets: the item after each prompt.
            max_rows: maximum rows per sequence; a sequence with more rows is repeated, each copy for some of the rows.
        """
        # Only equality of items matters here, so items are numbered in order of appearance and sorted by number.
        numbers: dict[Item, int] = {}
        rows = [[*history, target] for history, target in zip(histories, targets, strict=True)]
        keys = [tuple(numbers.setdefault(item, len(numbers)) for item in row) for row in rows]
        groups: list[list[int]] = []
        # Sorted, all sequences with prefix s follow s directly. In reverse, the last group is the only candidate.
        for row in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):
            if groups and keys[groups[-1][0]][: len(keys[row])] == keys[row]:
                groups[-1].append(row)
            else:
                groups.append([row])
        if max_rows is not None:
            groups = [part for group in groups for part in _split_evenly(group, max_rows)]
        trunk = torch.empty(len(rows), dtype=torch.long)
        for number, group in enumerate(groups):
            trunk[group] = number
        return cls([rows[group[0]] for group in groups], trunk, torch.tensor([len(history) for history in histories]))

    @classmethod
    def separate(cls, histories: Sequence[Sequence[Item]]) -> Windows:
        """Use each prompt as its own sequence."""
        items = [list(history) for history in histories]
        return cls(items, torch.arange(len(items)), torch.tensor([len(history) for history in items]))

    @property
    def prompts(self) -> list[list[Item]]:
        """The longest prompt of each of the U sequences."""
        longest = torch.zeros(len(self.items), dtype=torch.long).scatter_reduce_(0, self.trunk, self.seen, "amax")
        return [items[:seen] for items, seen in zip(self.items, longest.tolist(), strict=True)]

    @property
    def histories(self) -> list[list[Item]]:
        """The items of each row's prompt."""
        return [self.items[u][:seen] for u, seen in zip(self.trunk.tolist(), self.seen.tolist(), strict=True)]

    def rows(self, rows: slice) -> Windows:
        """Return the windows of a slice of the rows, without sequences that these rows do not use."""
        used, trunk = self.trunk[rows].unique(return_inverse=True)
        return Windows([self.items[u] for u in used.tolist()], trunk, self.seen[rows])


@dataclass(frozen=True, eq=False)
class RowWindows:
    """How many items the prompt of each row of a data set contains, a function of the data set alone.

    Attributes:
        row_ids: `(rows,)` ascending.
        seen: `(rows,)` number of most recent history items that the prompt contains, in the order of `row_ids`.
        groups: indices of the rows of each window, shortest prompt first.
        lengths: `(groups,)` number of items in the longest prompt of each window.
        cut: number of rows whose history is longer than their prompt.
        least_of_cut: minimum number of items in the prompts of those rows; 0 if no history is cut.
    """

    row_ids: Tensor
    seen: Tensor
    groups: list[list[int]]
    lengths: list[int]
    cut: int
    least_of_cut: int

    @classmethod
    def of(cls, rows: Dataset, items: Sequence[Item], max_items: int) -> RowWindows:
        """Reconstruct the sequences of the rows and cut them like `user_windows`.

        Two rows belong to one sequence if the history and target of one are a prefix of the history of the other, and
        both have the same `user` (if the data set has that column). Rows may be missing and in any order.

        Args:
            rows: a data set with the columns `row_id`, `history`, `target`.
            items: the items of the catalog, at least all that occur.
            max_items: maximum items per prompt.
        """
        lengths, parents = _parents(rows, items)
        sequence, sequence_lengths = _sequences(lengths, parents)
        starts = window_starts(sequence_lengths[sequence], lengths, max_items)
        order = np.lexsort((lengths, starts, sequence))
        groups = np.split(order, _run_starts(sequence[order], starts[order])[1:])
        return cls._of_groups(rows, lengths, lengths - starts, [group.tolist() for group in groups])

    @classmethod
    def separate(cls, rows: Dataset, max_items: int) -> RowWindows:
        """Use each row as its own window; its prompt is the last `max_items` of its history."""
        lengths = history_lengths(rows).numpy()
        return cls._of_groups(rows, lengths, np.minimum(lengths, max_items), [[row] for row in range(len(rows))])

    @classmethod
    def _of_groups(cls, rows: Dataset, lengths: np.ndarray, seen: np.ndarray, groups: list[list[int]]) -> RowWindows:
        row_ids, order = torch.tensor(rows["row_id"][:]).sort()
        cut = seen[seen < lengths]
        longest = [int(seen[group[-1]]) for group in groups]
        least = int(cut.min()) if len(cut) else 0
        return cls(row_ids, torch.from_numpy(seen)[order], groups, longest, len(cut), least)

    def seen_by(self, row_ids: Sequence[int]) -> list[int]:
        """Return how many items the prompts of these rows contain.

        Raises:
            KeyError: if a row is not in the data set.
        """
        wanted = torch.tensor(row_ids)
        index = torch.searchsorted(self.row_ids, wanted).clamp(max=len(self.row_ids) - 1)
        if not torch.equal(self.row_ids[index], wanted):
            raise KeyError(f"There is no row {int(wanted[self.row_ids[index] != wanted][0])} in the training data.")
        return self.seen[index].tolist()


def _split_evenly(group: list[int], max_size: int) -> list[list[int]]:
    size = math.ceil(len(group) / math.ceil(len(group) / max_size))
    return [group[start : start + size] for start in range(0, len(group), size)]


def user_windows(sequences: Sequence[Sequence[Item]], max_items: int = 20) -> list[Window]:
    """Cut sequences so that each item except the first of a sequence is a target in exactly one window.

    A window has at most `max_items + 1` items, so that a target sees at most the `max_items` before it, as it would in
    a row of its own. A sequence that fits is one window. A longer one becomes overlapping windows, in which a target
    outside the first window sees at least `max_items // 2` items. Sequences with fewer than two items have no window.
    """
    columns = window_bounds(lengths_of(sequences), max_items)
    return [
        Window(list(sequences[index][start:stop]), first_target - start)
        for index, start, first_target, stop in zip(*(column.tolist() for column in columns), strict=True)
    ]


def window_bounds(lengths: np.ndarray, max_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the windows of `user_windows` as positions.

    Args:
        lengths: length of each sequence.
        max_items: maximum items per prompt.

    Returns:
        The sequence of each window, and where in it the window begins, its first target is, and the window ends, each
        `(windows,)`.
    """
    counts = (lengths - 1).clip(min=0)  # targets per sequence
    row = np.repeat(np.arange(len(lengths)), counts)
    positions = ranges(np.ones_like(counts), counts + 1)
    starts = window_starts(lengths[row], positions, max_items)
    first = _run_starts(row, starts)
    last = np.append(first, len(row))[1:] - 1
    return row[first], starts[first], positions[first], positions[last] + 1


def window_starts(lengths: np.ndarray, positions: np.ndarray, max_items: int) -> np.ndarray:
    """Return where the window of each target starts in its sequence, elementwise. This is the rule of `user_windows`.

    Args:
        lengths: lengths of the sequences.
        positions: positions of the targets in their sequences, >= 1.
        max_items: maximum items per prompt, >= 1.
    """
    check_number("max_items", max_items, COUNT)
    stride = max_items - max_items // 2
    number = (positions - max_items - 1) // stride + 1  # index of the window; <= 0 in the first one
    ends = np.minimum(max_items + 1 + number * stride, lengths)
    return np.where(number <= 0, 0, (ends - max_items - 1).clip(min=0))


def _run_starts(*keys: np.ndarray) -> np.ndarray:
    """Return where runs of equal keys start, given sorted keys >= 0 of the same length; the first run starts at 0."""
    return np.flatnonzero(np.any([np.diff(key, prepend=-1) != 0 for key in keys], axis=0))


def history_lengths(rows: Dataset) -> Tensor:
    """Return the number of items in each row's history, `(rows,)`."""
    return list_lengths(rows, "history")


def list_lengths(rows: Dataset, name: str) -> Tensor:
    """Return the length of each row's list in a column, `(rows,)`."""
    parts = (_column(rows, name, start, start + CHUNK) for start in range(0, len(rows), CHUNK))
    lengths = [np.empty(0, np.int64), *(pc.list_value_length(part).to_numpy() for part in parts)]
    return torch.from_numpy(np.concatenate(lengths))


def count_repeats(rows: Dataset) -> int:
    """Return how many rows have a target that is in their `history`."""
    repeats = 0
    for start in range(0, len(rows), CHUNK):
        histories, targets = (_column(rows, name, start, start + CHUNK) for name in ("history", "target"))
        row = pc.list_parent_indices(histories)
        equal = pc.equal(pc.list_flatten(histories), targets.take(row))
        repeats += len(pc.unique(row.filter(equal)))
    return repeats


def _parents(rows: Dataset, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Return the history length of each row, and its parent: the row whose history and target are its longest prefix.

    The parent is -1 for a history without such a row. Prefixes are compared by 64-bit hashes, each a sum over items of
    a random number for the item times one for its position. Code that computes rows together compares the items again.
    """
    random, count = np.random.default_rng(0), len(rows)
    item_keys = _random_odd(random, len(items))
    lengths = history_lengths(rows).numpy()
    position_keys = _random_odd(random, 1 + int(lengths.max()))
    user_keys = np.zeros(count, np.uint64)
    if "user" in rows.column_names:
        numbers: dict[str, int] = {}  # users of any Arrow type; None is a user too
        users = np.array([numbers.setdefault(repr(user), len(numbers)) for user in rows["user"]])
        user_keys = _random_odd(random, len(numbers))[users]
    row_hashes, parents = np.zeros(count, np.uint64), np.full(count, -1)

    def hash_prefixes(part: slice, counts: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the row and the hash of each prefix of the histories."""
        starts = counts.cumsum() - counts
        row = np.repeat(np.arange(part.start, part.stop), counts)
        terms = item_keys[indices] * position_keys[ranges(np.zeros_like(counts), counts)]
        sums = terms.cumsum()
        return row, sums - np.repeat(sums[starts] - terms[starts], counts) + user_keys[row]

    for part, counts, indices in _histories(rows, items):
        targets = _indices_in(items, _column(rows, "target", part.start, part.stop))
        history_hashes = hash_prefixes(part, counts, indices)[1][counts.cumsum() - 1]
        row_hashes[part] = history_hashes + item_keys[targets] * position_keys[counts]
    order = row_hashes.argsort(kind="stable")
    sorted_hashes = row_hashes[order]
    for part, counts, indices in _histories(rows, items):
        row, hashes = hash_prefixes(part, counts, indices)
        index = np.minimum(np.searchsorted(sorted_hashes, hashes), count - 1)
        matches = np.flatnonzero(sorted_hashes[index] == hashes)
        parents[row[matches]] = order[index[matches]]  # the last assignment to a row remains: its longest prefix
    return lengths, parents


def _sequences(lengths: np.ndarray, parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sequence of each row, `(rows,)`, and the number of items in each sequence, including targets.

    A row that is a prefix of several sequences belongs to the longest one.
    """
    sequence, sequence_lengths = np.full(len(lengths), -1), []
    for row in np.argsort(-lengths, kind="stable").tolist():
        if sequence[row] >= 0:
            continue
        sequence_lengths.append(lengths[row] + 1)
        while row >= 0 and sequence[row] < 0:
            sequence[row] = len(sequence_lengths) - 1
            row = parents[row]
    return sequence, np.array(sequence_lengths)


def _histories(rows: Dataset, items: Sequence[Item]) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield slices of the rows, the lengths of their histories, and the concatenated indices of their items."""
    for start in range(0, len(rows), CHUNK):
        histories = _column(rows, "history", start, start + CHUNK)
        lengths = pc.list_value_length(histories).to_numpy()
        number = lengths.cumsum() // ITEMS_AT_ONCE
        ends = [*(np.flatnonzero(np.diff(number)) + 1).tolist(), len(lengths)]
        for begin, end in itertools.pairwise([0, *ends]):
            values = pc.list_flatten(histories.slice(begin, end - begin))
            yield slice(start + begin, start + end), lengths[begin:end], _indices_in(items, values)


def _column(rows: Dataset, name: str, start: int, stop: int) -> pa.Array:
    return rows.select_columns([name]).with_format("arrow")[start:stop][name].combine_chunks()


def _indices_in(items: Sequence[Item], values: pa.Array) -> np.ndarray:
    known = pa.array(items)
    return pc.index_in(values.cast(known.type), known).to_numpy(zero_copy_only=False)


def _random_odd(random: np.random.Generator, count: int) -> np.ndarray:
    return random.integers(2**63, size=count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
