"""The two formats of prompts: one row per prompt, or windows, in which several prompts share a row.

*Separate prompts*: a left-padded batch `{"input_ids": (B, P), "attention_mask": (B, P)}`.

*Windows*: U left-padded trunks `{"input_ids": (U, T), "attention_mask": (U, T)}` and, for each of B prompts, the index
of its trunk, `"trunk"` `(B,)`, and its cut, `"cut"` `(B,)`: the prompt is the first `cut` tokens of the trunk, padding
not counted. The tokens after the cut are hidden from the prompt. Where they are also the first tokens of a trajectory,
that part of the trajectory is read from the trunk at no extra cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


Prompts = Mapping[str, Tensor]


class Trunks(NamedTuple):
    """Prompts of either format as prefixes of trunks.

    Attributes:
        input_ids, mask: `(U, T)`, left-padded.
        trunk: `(B,)` index of each prompt's trunk.
        cut: `(B,)` number of the trunk's tokens that each prompt sees.
        shared: whether prompts may share trunks. If not, U = B, and each prompt is its whole trunk.
    """

    input_ids: Tensor
    mask: Tensor
    trunk: Tensor
    cut: Tensor
    shared: bool

    @classmethod
    def of(cls, prompts: Prompts) -> Trunks:
        """Return prompts of either format as trunks."""
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
        """Return the next `count` tokens of the trunk after each prompt, -1 after its end: `(B, count)`."""
        columns = self.last[:, None] + torch.arange(1, count + 1, device=self.cut.device)
        width = self.mask.shape[1]
        tokens = self.input_ids[self.trunk[:, None], columns.clamp(max=width - 1)]
        return tokens.masked_fill(columns >= width, -1)


def num_prompts(prompts: Prompts) -> int:
    """Return the number of prompts, B."""
    return len(prompts["cut"] if "cut" in prompts else prompts["input_ids"])


def some_prompts(prompts: Prompts, rows: slice) -> Prompts:
    """Select prompts and keep their format. Trunks without a selected prompt are dropped."""
    if "trunk" not in prompts:
        return {name: value[rows] for name, value in prompts.items()}
    used, trunk = prompts["trunk"][rows].unique(return_inverse=True)
    trunks = {name: prompts[name][used] for name in ("input_ids", "attention_mask")}
    return trunks | {"trunk": trunk, "cut": prompts["cut"][rows]}


def separate_prompts(prompts: Prompts) -> Prompts:
    """Convert prompts of either format to separate prompts: one left-padded row per prompt."""
    if "trunk" not in prompts:
        return prompts
    trunks = Trunks.of(prompts)
    offsets = torch.arange(1 - int(trunks.cut.max()), 1, device=trunks.cut.device)
    columns = trunks.last[:, None] + offsets
    mask = columns > (trunks.last - trunks.cut)[:, None]
    ids = trunks.input_ids[trunks.trunk[:, None], columns.clamp(min=0)]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
