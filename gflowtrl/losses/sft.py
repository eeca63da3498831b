"""Supervised fine-tuning on the legal tokens."""

from __future__ import annotations

from torch import Tensor

from .common import expect_shape, real_steps


def sft(log_probs: Tensor, lengths: Tensor, token_mean: bool = False) -> Tensor:
    """`-sum_l log pi(t_l | s_l)`: negative log-likelihood of an id, with pi normalized over the tree's children only.

    Meant for the observed target only (GFlowGR adds it to its balance loss). Over targets drawn from p its minimum is
    at pi = p; with one logged target per history, that puts all probability on this one item.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken. Tree-normalized ones (`StepScores.log_probs`)
            train the distribution that decoding uses; ones over the whole vocabulary give TRL's plain SFT.
        lengths: `(B, K)` number of tokens of each id; later steps add 0.
        token_mean: return the mean over an id's tokens, as `transformers` models do, instead of the sum.

    Returns:
        `(B, K)`, in nats.
    """
    expect_shape("lengths", lengths, log_probs.shape[:2], "(prompts, trajectories)")
    total = -log_probs.masked_fill(~real_steps(lengths, log_probs.shape[2]), 0.0).sum(-1)
    return total / lengths if token_mean else total
