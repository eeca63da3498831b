"""How much of its semantic id an item shares with the target."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.data import Step

from .reward import Reward


class TokenSimilarityReward(Reward):
    """Number of positions at which a leaf's id has the same token as the target's; L, its length, for the target.

    r_sim of GFlowGR (arXiv 2506.16114). Ids are made so that similar items share tokens, the first ones above all: the
    reward spreads mass over the target's neighborhood. It belongs to the leaf: a second item there adds nothing.
    Reads the column `target`.

    Args:
        normalize: divide by the length of the target's id, so that values lie in [0, 1].
        prefix: count only the positions before the first difference. Right where the meaning of a token depends on the
            tokens before it, as in residual quantization.
    """

    def __init__(self, normalize: bool = False, prefix: bool = False):
        super().__init__("token_similarity")
        self.normalize, self.prefix = normalize, prefix

    def score_items(self, step: Step) -> Tensor:
        catalog = self._bound_catalog()
        return self._items_from_leaves(self._agreement(step, catalog.tree.paths[None]))

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor:
        catalog = self._bound_catalog()
        return self._agreement(step, catalog.tree.paths[leaves.to(catalog.device)]).to(leaves.device)

    def _agreement(self, step: Step, paths: Tensor) -> Tensor:
        """`paths (B or 1, n, L) -> (B, n)`; position by position, so that no table of B x n x L is made."""
        catalog = self._bound_catalog()
        target = catalog.leaf_of(step.column("target", self._owner))
        own = catalog.tree.paths[target]
        count = torch.zeros(len(own), paths.shape[1], device=own.device)
        so_far: Tensor | None = None
        for depth in range(catalog.tree.max_depth):
            same = (paths[:, :, depth] == own[:, None, depth]) & (own[:, None, depth] >= 0)
            if self.prefix:
                same = so_far = same if so_far is None else same & so_far
            count += same
        return count / catalog.tree.leaf_lengths[target][:, None] if self.normalize else count
