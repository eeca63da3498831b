"""Samplers that order training rows as a function of (seed, epoch), so that a resumed run repeats the order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class GroupedEpochSampler(Sampler[int]):
    """Yield rows in random order, keeping the rows of a group together.

    Groups with similar prompt lengths and similar numbers of rows are batched together, because a batch is padded to
    the largest of each. Batches come in random order. A group may be cut by the end of a batch; it is then computed
    in two parts.

    Args:
        groups: row indices, each in exactly one group (`RowWindows.groups`).
        lengths: length of each group's longest prompt, in any unit.
        batch_size: rows per step over all processes.
        seed: any integer.
        spread: number of batches among which groups are sorted; more means less padding and less randomness.
    """

    def __init__(
        self, groups: Sequence[Sequence[int]], lengths: Sequence[int], batch_size: int, seed: int, spread: int = 100
    ):
        self.groups = groups
        self.sizes = [(length, len(group)) for length, group in zip(lengths, groups, strict=True)]
        self.batch_size, self.seed, self.spread, self.epoch = batch_size, seed, spread, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.groups), generator=generator).tolist()
        rows: list[int] = []
        pool: list[int] = []  # groups that are sorted together
        pooled_rows = 0
        for number in order:
            pool.append(number)
            pooled_rows += len(self.groups[number])
            if pooled_rows >= self.spread * self.batch_size or number == order[-1]:
                pool.sort(key=self.sizes.__getitem__, reverse=True)
                rows += [row for n in pool for row in self.groups[n]]
                pool, pooled_rows = [], 0
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        remainder = batches.pop() if len(batches[-1]) < self.batch_size else []
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[number]
        yield from remainder


class LengthGroupedEpochSampler(GroupedEpochSampler):
    """Yield rows in random order, batching rows of similar length: every row is its own group.

    The length grouping of transformers draws from the global generator, whose state at the start of an epoch is lost
    when a run is interrupted. This sampler repeats the order of the epoch.

    Args:
        lengths: `(rows,)` length of each row.
        batch_size, seed, spread: as in `GroupedEpochSampler`.
    """

    def __init__(self, lengths: Tensor, batch_size: int, seed: int, spread: int = 50):
        super().__init__([[row] for row in range(len(lengths))], lengths.tolist(), batch_size, seed, spread)
