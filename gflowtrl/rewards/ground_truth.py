"""A reward for the logged target item."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.data import Step

from .reward import Reward


class GroundTruthReward(Reward):
    """1 for the logged target, 0 for all other items. Reads the column `target`.

    On its own, this reward makes a GFlowNet learn what supervised fine-tuning learns. In a sum, its weight sets the
    share of the logged item in the target distribution (the interaction level r_a of GFlowGR, arXiv 2506.16114).
    """

    def __init__(self) -> None:
        super().__init__("ground_truth")

    def score_items(self, step: Step) -> Tensor:
        catalog = self._bound_catalog()
        index = catalog.index_of(step.column("target", self._owner)).to(catalog.device)
        return torch.zeros(len(index), len(catalog), device=index.device).scatter_(1, index[:, None], 1.0)

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor:
        target = self._bound_catalog().leaf_of(step.column("target", self._owner)).to(leaves.device)
        return (leaves == target[:, None]).float()
