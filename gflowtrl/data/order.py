"""The order of training rows in an epoch: a function of (seed, epoch), so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class GroupedEpochSampler(Sampler[int]):
    """Rows in random order, the rows of a group together.

    Groups whose prompts and numbers of rows are alike come together, because a batch is padded to the largest of each;
    batches come in random order. A group may be cut by the end of a batch: it then is computed in two parts.

    Args:
        groups: rows, each in one group (`RowWindows.groups`).
        lengths: of each group's longest prompt, in any unit.
        batch_size: rows of one step over all processes.
        seed: any integer.
        spread: batches among which groups are sorted; more means less padding and less randomness.
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


class LengthGroupedEpochSampler(GroupedEpochSampler):
    """Rows in random order, rows of like length together: every row its own group.

    transformers' own length grouping draws from the global generator, whose state at the beginning of an epoch is lost
    when a run is interrupted; this one repeats the epoch's order.

    Args:
        lengths: `(rows,)`.
        batch_size, seed, spread: as for `GroupedEpochSampler`.
    """

    def __init__(self, lengths: Tensor, batch_size: int, seed: int, spread: int = 50):
        super().__init__([[row] for row in range(len(lengths))], lengths.tolist(), batch_size, seed, spread)
