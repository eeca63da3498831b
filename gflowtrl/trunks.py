"""The two formats of prompts: each in a row of its own, or as beginnings of rows that several share.

*Separate*: a left-padded batch `{"input_ids": (B, P), "attention_mask": (B, P)}`.

*Windows*: U left-padded trunks `{"input_ids": (U, T), "attention_mask": (U, T)}`, and for each of B prompts the trunk
that it begins, `"trunk"` `(B,)`, and its cut, `"cut"` `(B,)`: how many tokens of the trunk, padding not counted, it
sees. What follows behind the cut is hidden from the prompt; where it happens to be a trajectory's beginning, the
trajectory is read off the trunk and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


Prompts = Mapping[str, Tensor]


class Trunks(NamedTuple):
    """Prompts of either format as beginnings of trunks.

    Attributes:
        input_ids, mask: `(U, T)`, left-padded.
        trunk: `(B,)` the trunk that each prompt begins.
        cut: `(B,)` how many of its tokens each prompt sees.
        shared: whether prompts may share trunks; else U = B, and each prompt is its whole trunk.
    """

    input_ids: Tensor
    mask: Tensor
    trunk: Tensor
    cut: Tensor
    shared: bool

    @classmethod
    def of(cls, prompts: Prompts) -> Trunks:
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        if "trunk" in prompts:
            return cls(ids, mask, prompts["trunk"], prompts["cut"], True)
        return cls(ids, mask, torch.arange(len(ids), device=ids.device), mask.sum(1), False)

    @property
    def last(self) -> Tensor:
        """The column of each prompt's last token in its trunk: `(B,)`."""
        if not self.shared:
            return torch.full_like(self.trunk, self.mask.shape[1] - 1)
        return (self.mask.shape[1] - self.mask.sum(1))[self.trunk] + self.cut - 1

    def following(self, count: int) -> Tensor:
        """The tokens that stand behind each prompt in its trunk, -1 beyond its end: `(B, count)`."""
        columns = self.last[:, None] + torch.arange(1, count + 1, device=self.cut.device)
        width = self.mask.shape[1]
        tokens = self.input_ids[self.trunk[:, None], columns.clamp(max=width - 1)]
        return tokens.masked_fill(columns >= width, -1)


def num_prompts(prompts: Prompts) -> int:
    """B, the number of prompts."""
    return len(prompts["cut"] if "cut" in prompts else prompts["input_ids"])


def some_prompts(prompts: Prompts, rows: slice) -> Prompts:
    """Some of the prompts, in their format; trunks that none of them begins are left out."""
    if "trunk" not in prompts:
        return {name: value[rows] for name, value in prompts.items()}
    used, trunk = prompts["trunk"][rows].unique(return_inverse=True)
    trunks = {name: prompts[name][used] for name in ("input_ids", "attention_mask")}
    return trunks | {"trunk": trunk, "cut": prompts["cut"][rows]}


def separate_prompts(prompts: Prompts) -> Prompts:
    """Prompts of either format, each in a left-padded row of its own."""
    if "trunk" not in prompts:
        return prompts
    trunks = Trunks.of(prompts)
    back = torch.arange(int(trunks.cut.max()) - 1, -1, -1, device=trunks.cut.device)
    columns = trunks.last[:, None] - back
    mask = columns > (trunks.last - trunks.cut)[:, None]
    ids = trunks.input_ids[trunks.trunk[:, None], columns.clamp(min=0)]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
