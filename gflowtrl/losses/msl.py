"""Masked softmax loss: cross entropy over the legal tokens, at a temperature."""

from __future__ import annotations

from torch import Tensor

from gflowtrl.checks import POSITIVE, check_number

from .common import expect_shape, real_steps


def msl(log_probs: Tensor, child_log_probs: Tensor, lengths: Tensor, temperature: float = 1.0) -> Tensor:
    """Masked softmax loss: cross entropy over the legal tokens only, at a temperature.

    A token without alternatives adds 0. At temperature 1 the loss equals `sft` over the tree.

    Args:
        log_probs: `(B, K, L)` tree-normalized log-probabilities of the tokens taken.
        child_log_probs: `(B, K, L, C)` log-probabilities of all legal tokens, -inf on padding.
        lengths: `(B, K)` number of tokens of each id.
        temperature: tau > 0 that divides the logits. The loss trains the distribution at tau, so the trainer sets tau
            on the policy and also decodes with it (`LossSpec.sets_temperature`).

    Returns:
        `(B, K)`, in nats, summed over tokens.

    References:
        Wang et al., MSL: Not All Tokens Are What You Need for Tuning LLM as a Recommender, SIGIR 2025.
    """
    check_number("temperature", temperature, POSITIVE)
    expect_shape("child_log_probs", child_log_probs, (*log_probs.shape, child_log_probs.shape[-1]), "(B, K, L, C)")
    real = real_steps(lengths, log_probs.shape[-1])
    # Steps after the end of an id have no children. They are filled before logsumexp, which has no gradient there.
    logits = child_log_probs.masked_fill(~real[..., None], 0.0) / temperature
    taken = log_probs / temperature - logits.logsumexp(-1)
    return -taken.masked_fill(~real, 0.0).sum(-1)
