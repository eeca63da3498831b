"""ReRe's reward of a beam: the hit, and a penalty for what was ranked instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gflowtrl.data import Step

from .reward import Reward


class RankPenaltyReward(Reward):
    """1 for the logged target; in a group that holds it, `-(1 / log2(i + 2)) / sum_j 1 / log2(j + 2)` for a miss at
    place i (from 0), so that confident misses cost most; 0 in other groups.

    The group's order is what the sampler gives: `"beam"` gives the best first. Negative values need
    `reward_transform="exp"`. Reads the column `target`.

    References:
        ReRe (the reward of MiniOneRec), used with GRPO on constrained beams.
    """

    scores_all_items = False  # what an item gets depends on the others of its group

    def __init__(self) -> None:
        super().__init__("rank_penalty")

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Refused: one completion at a time has no rank."""
        raise ValueError("RankPenaltyReward looks at whole groups, so it works in gflowtrl's trainers only.")

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor:
        target = self._bound_catalog().leaf_of(step.column("target", self._owner)).to(leaves.device)
        hit = leaves == target[:, None]
        share = 1 / torch.log2(torch.arange(leaves.shape[1], device=leaves.device) + 2.0)
        penalty = -(share / share.sum()) * hit.any(1, keepdim=True)
        return torch.where(hit, 1.0, penalty)

    @classmethod
    def needs(cls, spec: Mapping[str, Any]) -> set[str]:
        return {"group"}
