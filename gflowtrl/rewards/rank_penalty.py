"""The reward of ReRe: 1 for the target, and a penalty by rank for the other items of the beam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gflowtrl.data import Step

from .reward import Reward


class RankPenaltyReward(Reward):
    """1 for the logged target, and a negative value for the other leaves of a group that contains the target.

    A miss at position i (from 0) gets `-(1 / log2(i + 2)) / sum_j 1 / log2(j + 2)`, so that confident misses cost the
    most. In groups without the target, all leaves get 0. The order of the group is that of the sampler; `"beam"`
    returns the best leaf first. Negative values require `reward_transform="exp"`. Reads the column `target`.

    References:
        ReRe (the reward of MiniOneRec), used with GRPO on constrained beams.
    """

    scores_all_items = False  # the value of an item depends on the other items of its group

    def __init__(self) -> None:
        super().__init__("rank_penalty")

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Raise an error: a single completion has no rank."""
        raise ValueError("RankPenaltyReward scores whole groups, not single completions; use a trainer of gflowtrl.")

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor:
        target = self._bound_catalog().leaf_of(step.column("target", self._owner)).to(leaves.device)
        hit = leaves == target[:, None]
        share = 1 / torch.log2(torch.arange(leaves.shape[1], device=leaves.device) + 2.0)
        penalty = -(share / share.sum()) * hit.any(1, keepdim=True)
        return torch.where(hit, 1.0, penalty)

    @classmethod
    def needs(cls, spec: Mapping[str, Any]) -> set[str]:
        return {"group"}

    @classmethod
    def may_be_negative(cls, spec: Mapping[str, Any]) -> bool:
        return True
