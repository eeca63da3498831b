"""Exact flows: the target policy is known at every state, so nothing has to be estimated."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import expect_shape, real_steps


def exact_flow(child_log_probs: Tensor, child_target_log_probs: Tensor, lengths: Tensor) -> Tensor:
    """`sum_l KL(pi*(. | s_l) || pi(. | s_l))` over the states s_0 ... s_{L-1} that a trajectory visits.

    The loss is zero if and only if pi = pi* at every visited state, so any set of trajectories that visits every state
    is enough. For trajectories drawn from pi* = R / Z the expectation is KL(R / Z || pi) over all leaves (chain rule),
    without the noise of the next token.

    Args:
        child_log_probs: `(B, K, L, C)` log pi of every child of each visited state, padded with -inf.
        child_target_log_probs: `(B, K, L, C)` log pi* of the same children (`normalized_flows`), padded with -inf.
            A child without any reward below it also has -inf and adds 0, and so does a state without any reward below.
        lengths: `(B, K)` number of tokens of each id; later steps add 0.

    Returns:
        `(B, K)`, in nats.

    Requirements: the reward of *every* leaf, computed by `score_items` of all rewards.

    References:
        gflowtrl's own. Bengio et al., GFlowNet foundations, JMLR 2023 (pi*(t | s) = F(child) / F(s)).
    """
    expect_shape("child_target_log_probs", child_target_log_probs, child_log_probs.shape, "child_log_probs.shape")
    expect_shape("lengths", lengths, child_log_probs.shape[:2], "(prompts, trajectories)")
    counts = real_steps(lengths, child_log_probs.shape[2])[..., None] & (child_target_log_probs > -torch.inf)
    # Masked before exp and again after the product: exp(-inf) * inf is NaN, in the gradient too.
    log_target = child_target_log_probs.masked_fill(~counts, 0.0)
    divergence = log_target.exp() * (log_target - child_log_probs)
    return divergence.masked_fill(~counts, 0.0).sum((-2, -1))


def normalized_flows(child_log_flows: Tensor) -> Tensor:
    """Return log pi*(child | state) = log F(child) - log F(state), from log F of the children.

    Args:
        child_log_flows: `(..., C)`, -inf for padding.

    Returns:
        `(..., C)`, normalized over the children; -inf for padding and at states without any reward below.
    """
    total = child_log_flows.logsumexp(-1, keepdim=True)
    return child_log_flows - total.masked_fill(total == -torch.inf, 0.0)
