"""A reward from the tokens that the semantic ids of an item and the target share."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.data import Step

from .reward import Reward


class TokenSimilarityReward(Reward):
    """Number of positions at which a leaf has the same token as the target. The target itself gets its length L.

    This is r_sim of GFlowGR (arXiv 2506.16114). Semantic ids are built so that similar items share tokens, mainly the
    first ones. The reward therefore spreads mass over the neighborhood of the target. It is a value of the leaf: a
    second item at the leaf does not increase it. Reads the column `target`.

    Args:
        normalize: divide by the length of the target's id, so that values are in [0, 1].
        prefix: count only the positions before the first difference. Use this if the meaning of a token depends on the
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
        """Count equal tokens: `paths (B or 1, n, L) -> (B, n)`. The loop over positions avoids a B x n x L table."""
        catalog = self._bound_catalog()
        target = catalog.leaf_of(step.column("target", self._owner))
        target_path = catalog.tree.paths[target]
        count = torch.zeros(len(target), paths.shape[1], device=target_path.device)
        counts = torch.ones_like(count, dtype=torch.bool)  # whether equal tokens at this position count
        for depth in range(catalog.tree.max_depth):
            token = target_path[:, None, depth]
            same = (paths[:, :, depth] == token) & (token >= 0) & counts
            counts = same if self.prefix else counts
            count += same
        return count / catalog.tree.leaf_lengths[target][:, None] if self.normalize else count
