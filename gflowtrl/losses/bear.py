"""BEAR: cross entropy of the target with weights by its place in the beam."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.checks import COUNT, NOT_NEGATIVE, POSITIVE, check_number

from .common import expect_shape, real_steps


def bear(
    log_probs: Tensor, child_log_probs: Tensor, lengths: Tensor, num_beams: int = 10, xi: float = 2.75,
    lam: float = 0.25,
) -> Tensor:  # fmt: skip
    """Beam-aware weights on the target's tokens: `-sum_l w_l log pi(t_l | s_l)`, with w in proportion to
    `1 + lam sigmoid((log pi(t_l | s_l) - log q_l) / xi)`, q_l the num_beams-th largest probability among the children.

    If a state has fewer children, q is the smallest probability. Weights have no gradient. They grow as the token gets
    safer within the beam. They sum to one over all tokens of the micro-batch that have an alternative; tokens without
    one add 0. So the loss is a weighted mean over tokens, as in the authors' code, not a sum per id as `sft`.

    Args:
        log_probs: `(B, 1, L)` tree-normalized log-probabilities of the target's tokens.
        child_log_probs: `(B, 1, L, C)` log-probabilities of all children, -inf on padding.
        lengths: `(B, 1)` number of tokens of the target.
        num_beams: place in the order of the children that a token must reach, B in the paper.
        xi: temperature of the sigmoid, > 0.
        lam: weight of the sigmoid, >= 0; with 0 the loss is the mean over the tokens.

    Returns:
        `(B, 1)`, in nats; the mean is the loss.

    References:
        BEAR, SIGIR 2026, arXiv 2601.22925 (the weights are the gradient of its regularizer, with lam = lambda / xi).
    """
    check_number("num_beams", num_beams, COUNT)
    check_number("xi", xi, POSITIVE)
    check_number("lam", lam, NOT_NEGATIVE)
    expect_shape("child_log_probs", child_log_probs, (*log_probs.shape, child_log_probs.shape[-1]), "(B, K, L, C)")
    children = (child_log_probs > -torch.inf).sum(-1)
    open_steps = real_steps(lengths, log_probs.shape[-1]) & (children > 1)
    with torch.no_grad():
        best = child_log_probs.topk(min(int(num_beams), child_log_probs.shape[-1])).values
        last = (children.clamp(max=best.shape[-1]) - 1).clamp(min=0)
        margin = log_probs - best.gather(-1, last[..., None]).squeeze(-1)
        weights = (1 + lam * (margin / xi).sigmoid()).masked_fill(~open_steps, 0.0)
        weights = weights / weights.sum().clamp(min=1e-8)
    return -lengths.numel() * (weights * log_probs.masked_fill(~open_steps, 0.0)).sum(-1)
