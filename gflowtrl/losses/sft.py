"""Supervised fine-tuning on the legal tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.checks import SHARE_BELOW_ONE, check_number

from .common import expect_shape, real_steps


def sft(
    log_probs: Tensor,
    lengths: Tensor,
    child_log_probs: Tensor | None = None,
    token_mean: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`-sum_l log pi(t_l | s_l)`: negative log-likelihood of an id, with pi normalized over the tree's children only.

    Meant for the observed target only (GFlowGR adds it to its balance loss). Over targets drawn from p its minimum is
    at pi = p; with one logged target per history, that puts all probability on this one item.

    With `label_smoothing` s > 0, the target at each visited state is (1 - s) on the token taken plus s spread evenly
    over all children of the state: `-(1 - s) log pi(t_l | s_l) - s * mean over the children of log pi(child | s_l)`.
    All of it stays on legal tokens, and a state with one child adds 0. Over targets drawn from p, the minimum at a
    state with C children is pi = (1 - s) p + s / C.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken. Tree-normalized ones (`StepScores.log_probs`)
            train the distribution that decoding uses; ones over the whole vocabulary give TRL's plain SFT.
        lengths: `(B, K)` number of tokens of each id; later steps add 0.
        child_log_probs: `(B, K, L, C)` log pi of every child of each visited state, -inf on padding. Only used, and
            then required, with `label_smoothing`; `log_probs` must then be tree-normalized too.
        token_mean: return the mean over an id's tokens, as `transformers` models do, instead of the sum.
        label_smoothing: s in [0, 1), as in `torch.nn.functional.cross_entropy`.

    Returns:
        `(B, K)`, in nats.

    Raises:
        ValueError: `label_smoothing` is out of range, or set without `child_log_probs`.

    References:
        Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016 (label smoothing).
    """
    expect_shape("lengths", lengths, log_probs.shape[:2], "(prompts, trajectories)")
    check_number("label_smoothing", label_smoothing, SHARE_BELOW_ONE)
    if label_smoothing:
        even = _mean_over_children(log_probs, child_log_probs)
        log_probs = (1 - label_smoothing) * log_probs + label_smoothing * even
    total = -log_probs.masked_fill(~real_steps(lengths, log_probs.shape[2]), 0.0).sum(-1)
    return total / lengths if token_mean else total


def _mean_over_children(log_probs: Tensor, child_log_probs: Tensor | None) -> Tensor:
    """Return the mean of log pi over the children of each visited state: `(B, K, L)`, 0 after the end of an id."""
    if child_log_probs is None:
        raise ValueError("label_smoothing spreads over the children of each state and needs child_log_probs.")
    expect_shape("child_log_probs", child_log_probs, (*log_probs.shape, child_log_probs.shape[-1]), "(B, K, L, C)")
    present = child_log_probs > -torch.inf
    return child_log_probs.masked_fill(~present, 0.0).sum(-1) / present.sum(-1).clamp(min=1)
