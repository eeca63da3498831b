"""Supervised fine-tuning on the legal tokens."""

from __future__ import annotations

from torch import Tensor

from .common import expect_shape, real_steps


def sft(log_probs: Tensor, lengths: Tensor, token_mean: bool = False) -> Tensor:
    """`-sum_l log pi(t_l | s_l)`: negative log-likelihood of an id, with pi normalized over the tree's children only.

    Meant for the observed target alone (GFlowGR adds it to its balance loss). Its minimum over targets drawn from p is
    p itself; where one target a history was logged, that is all probability on this one item.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken. Tree-normalized ones (`StepScores.log_probs`)
            train what decoding uses; log-probabilities over the whole vocabulary give the plain SFT of TRL.
        lengths: `(B, K)` number of tokens of each id; later steps add 0.
        token_mean: the mean over an id's tokens, as `transformers` models compute it, instead of their sum.

    Returns:
        `(B, K)`, in nats.
    """
    batch, num_generations, num_steps = log_probs.shape
    expect_shape("lengths", lengths, (batch, num_generations), "(prompts, trajectories)")
    total = -log_probs.masked_fill(~real_steps(lengths, num_steps), 0.0).sum(-1)
    return total / lengths if token_mean else total
