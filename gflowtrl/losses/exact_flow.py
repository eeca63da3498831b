"""Exact flows: the target policy is known at every state, so nothing is estimated."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import expect_shape, real_steps


def exact_flow(child_log_probs: Tensor, child_target_log_probs: Tensor, lengths: Tensor) -> Tensor:
    """`sum_l KL(pi*(. | s_l) || pi(. | s_l))` over the states s_0 ... s_{L-1} that a trajectory visits.

    Zero if and only if pi = pi* at every visited state, so any set of trajectories that reaches every state will do.
    For trajectories drawn from pi* = R / Z the expectation is KL(R / Z || pi) over all leaves (chain rule), with the
    noise of the next token taken out.

    Args:
        child_log_probs: `(B, K, L, C)` log pi of every child of each visited state, padded with -inf.
        child_target_log_probs: `(B, K, L, C)` log pi* of the same children (`normalized_flows`), padded with -inf;
            -inf too where no reward lies below a child, which adds 0. A state without any reward below adds 0.
        lengths: `(B, K)` number of tokens of each id; later steps add 0.

    Returns:
        `(B, K)`, in nats.

    Requirements: the reward of *every* leaf, as `score_items` of all rewards gives it.

    References:
        gflowtrl's own. Bengio et al., GFlowNet foundations, JMLR 2023 (pi*(t | s) = F(child) / F(s)).
    """
    batch, num_generations, num_steps, _ = child_log_probs.shape
    expect_shape("child_target_log_probs", child_target_log_probs, child_log_probs.shape, "child_log_probs.shape")
    expect_shape("lengths", lengths, (batch, num_generations), "(prompts, trajectories)")
    counts = real_steps(lengths, num_steps)[..., None] & (child_target_log_probs > -torch.inf)
    # Masked before exp as well as after the product: exp(-inf) * inf is NaN, and stays NaN in the gradient.
    log_target = child_target_log_probs.masked_fill(~counts, 0.0)
    divergence = log_target.exp() * (log_target - child_log_probs)
    return divergence.masked_fill(~counts, 0.0).sum((-2, -1))


def normalized_flows(child_log_flows: Tensor) -> Tensor:
    """log pi*(child | state) = log F(child) - log F(state), from log F of the children.

    Args:
        child_log_flows: `(..., C)`, -inf for padding.

    Returns:
        `(..., C)`, normalized over the children; -inf for padding and at states without reward below.
    """
    total = child_log_flows.logsumexp(-1, keepdim=True)
    return child_log_flows - total.masked_fill(total == -torch.inf, 0.0)
