"""Prompts that are beginnings of other prompts: a user's rows, computed once.

Leave-one-out rows of one user are `[a] -> b`, `[a, b] -> c`, `[a, b, c] -> d`: as long as no history was cut, every
prompt is a prefix of the next. A causal model that reads the longest of them has computed all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from gflowtrl.catalog import Item


def prefix_groups(
    histories: Sequence[Sequence[Item]], max_history_items: int | None = None, max_size: int | None = None
) -> list[list[int]]:
    """Rows in groups of which every history is a prefix of the group's first, its longest one.

    Args:
        histories: items in chronological order.
        max_history_items: histories are cut to their last so many items first, as prompts are.
        max_size: larger groups are divided evenly, neighbours in length staying together. Without it groups are as
            few as can be; but attention over a row grows with the square of all that hangs on it.

    Returns:
        Each row number once; groups have at least one row, the longest history first. Groups come in the order of
        their smallest row number.
    """
    cut = 0 if max_history_items is None else -max_history_items
    # Equal items must sort together and nothing else is asked of the order, so any numbering of the items will do.
    numbers: dict[Item, int] = {}
    keys = [tuple(numbers.setdefault(item, len(numbers)) for item in history[cut:]) for history in histories]
    groups: list[list[int]] = []
    # What has s as a prefix follows s at once in this order: going backwards the last root is the only candidate.
    for row in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):
        root = keys[groups[-1][0]] if groups else ()
        if groups and root[: len(keys[row])] == keys[row]:
            groups[-1].append(row)
        else:
            groups.append([row])
    if max_size is not None:
        groups = [part for group in groups for part in _evenly(group, max_size)]
    return sorted(groups, key=min)


def _evenly(group: list[int], max_size: int) -> list[list[int]]:
    pieces = math.ceil(len(group) / max_size)
    size = math.ceil(len(group) / pieces)
    return [group[start : start + size] for start in range(0, len(group), size)]


def prompt_members(
    histories: Sequence[Sequence[Item]], max_history_items: int | None = None, max_size: int | None = None
) -> Tensor:
    """`prefix_groups` of a batch as a tensor `(U, C)`: rows of each group, the longest first, padded with -1."""
    groups = prefix_groups(histories, max_history_items, max_size)
    return pad_sequence([torch.tensor(group) for group in groups], True, -1)


class PrefixGroupedEpochSampler(Sampler[int]):
    """Rows in random order, rows that share a prompt together, as a function of (seed, epoch).

    Groups whose prompts and numbers of rows are alike come together, because a batch is padded to the largest of each;
    batches come in random order. A group may be cut by the end of a batch: it then is two.

    Args:
        groups: `prefix_groups` of all rows.
        prompt_lengths: of each group, in items.
        batch_size: rows of one step over all processes.
        seed: any integer.
        spread: batches among which groups are sorted; more means less padding and less randomness.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        batch_size: int,
        seed: int,
        spread: int = 50,
    ):
        # The shortest first: what a batch's end leaves to the next then still shares the longest prompt.
        self.groups = [list(reversed(group)) for group in groups]
        self.sizes = [(length, len(group)) for length, group in zip(prompt_lengths, self.groups, strict=True)]
        self.batch_size, self.seed, self.spread, self.epoch = batch_size, seed, spread, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.groups), generator=generator).tolist()
        rows: list[int] = []
        pool: list[int] = []
        waiting = 0
        for number in order:
            pool.append(number)
            waiting += len(self.groups[number])
            if waiting >= self.spread * self.batch_size or number == order[-1]:
                pool.sort(key=self.sizes.__getitem__, reverse=True)
                rows += [row for n in pool for row in self.groups[n]]
                pool, waiting = [], 0
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        short = batches.pop() if len(batches[-1]) < self.batch_size else []
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[number]
        yield from short
