"""The same reward for every item."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.data import Step

from .reward import Reward


class UniformReward(Reward):
    """1 / items for every item: exploration.

    In a sum with rewards that are probabilities, such as `collaborative` and `ground_truth`, its weight is the share
    of recommendations that are drawn at random, as in a log with a share of exploration (epsilon-greedy). Every item
    has a chance to be shown, also one that no model likes yet.
    """

    reads_target = False

    def __init__(self) -> None:
        super().__init__("uniform")

    def score_items(self, step: Step) -> Tensor:
        catalog = self._bound_catalog()
        return torch.full((len(step.row_ids), len(catalog)), 1 / len(catalog), device=catalog.device)
