"""Scores of given candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.finite import check_ranked
from gflowtrl.policy import Prompts, TreePolicy


TRAJECTORIES_PER_FORWARD = 2**12  # their scores take L * C numbers each


@torch.no_grad()
def candidate_log_probs(policy: TreePolicy, prompts: Prompts, candidates: Tensor) -> Tensor:
    """Return the log-probabilities of given items, which need no search.

    Items that share a semantic id share its probability equally.

    Args:
        policy: the policy.
        prompts: B prompts.
        candidates: `(B, C)` positions of items in the catalog, on the device of the model; -1 is padding.

    Returns:
        `(B, C)`; anything for padding.

    Raises:
        NonFiniteError: the model computes NaN.
    """
    log_probs = unchecked_log_probs(policy, prompts, candidates)
    check_ranked(candidates, log_probs, policy.model)
    return log_probs


@torch.no_grad()
def unchecked_log_probs(policy: TreePolicy, prompts: Prompts, candidates: Tensor) -> Tensor:
    """Return what `candidate_log_probs` returns, also NaN: processes that work together raise errors together."""
    catalog = policy.catalog.to(candidates.device)
    leaves = catalog.item_leaf[candidates.clamp(min=0)]
    columns = max(1, TRAJECTORIES_PER_FORWARD // max(1, len(leaves)))
    parts = [policy.score(prompts, part).trajectory_log_probs for part in leaves.split(columns, 1)]
    return torch.cat(parts, 1) - catalog.leaf_sizes[leaves].log()
