"""Baselines to compare the balance losses with, computed on the same group in the same forward.

They are registered with `register_loss`, like a user's loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.checks import NOT_NEGATIVE, POSITIVE, check_number

from .common import expect_shape, real_steps
from .registry import LossSpec, register_loss


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


def sdpo(log_probs: Tensor, ref_log_probs: Tensor, lengths: Tensor, leaves: Tensor, beta: float = 1.0) -> Tensor:
    """Softmax DPO: the target against several negatives, `-log sigmoid(-log sum_j exp(beta (D_j - D_+)))`, with
    `D = log pi - log pi_ref`.

    Negatives that equal the target are ignored. The loss is 0 if no negative remains.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken, over the tree or (as in TRL) over the whole
            vocabulary. Trajectory 0 is the observed target.
        ref_log_probs: `(B, K, L)` log-probabilities of the reference model, over the same tokens.
        lengths: `(B, K)` number of tokens of each id.
        leaves: `(B, K)` leaf of each trajectory.
        beta: scale of the differences, > 0.

    Returns:
        `(B, 1)`, in nats. With one negative this is DPO on the tokens of the ids. TRL's `DPOTrainer` appends an end
        token to both answers of a text dataset, which adds another term; an id has no end token.

    References:
        Chen et al., On Softmax Direct Preference Optimization for Recommendation, NeurIPS 2024.
    """
    check_number("beta", beta, POSITIVE)
    expect_shape("ref_log_probs", ref_log_probs, log_probs.shape, "log_probs.shape")
    expect_shape("leaves", leaves, log_probs.shape[:2], "(prompts, trajectories)")
    real = real_steps(lengths, log_probs.shape[-1])
    gain = (log_probs - ref_log_probs).masked_fill(~real, 0.0).sum(-1)
    others = leaves != leaves[:, :1]
    margins = (beta * (gain - gain[:, :1])).masked_fill(~others, torch.finfo(gain.dtype).min)
    return torch.nn.functional.softplus(margins.logsumexp(1, keepdim=True))


def grpo(log_probs: Tensor, ref_log_probs: Tensor, lengths: Tensor, advantages: Tensor, beta: float = 1e-3) -> Tensor:
    """GRPO's policy gradient with one update per group, and the KL estimate `exp(d) - d - 1` with
    `d = log pi_ref - log pi`.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken.
        ref_log_probs: `(B, K, L)` log-probabilities of the reference model.
        lengths: `(B, K)` number of tokens of each id.
        advantages: `(B, K)` rewards, normalized within the group.
        beta: weight of the KL estimate, >= 0 (TRL's name).

    Returns:
        `(B, K)`, the mean over the tokens of each trajectory.

    References:
        Shao et al., DeepSeekMath, arXiv 2402.03300. With constrained beams as the group and `RankPenaltyReward` this
        is the form used by ReRe.
    """
    check_number("beta", beta, NOT_NEGATIVE)
    expect_shape("ref_log_probs", ref_log_probs, log_probs.shape, "log_probs.shape")
    expect_shape("advantages", advantages, lengths.shape, "(prompts, trajectories)")
    ratio = (log_probs - log_probs.detach()).exp()  # 1, with the gradient of log pi
    difference = ref_log_probs - log_probs
    tokens = beta * (difference.exp() - difference - 1) - advantages[..., None] * ratio
    return tokens.masked_fill(~real_steps(lengths, log_probs.shape[-1]), 0.0).sum(-1) / lengths


register_loss("msl", LossSpec(msl, uses_target=True, sets_temperature=True))
register_loss("sdpo", LossSpec(sdpo, min_generations=2, uses_target=True, uses_negatives=True, any_label_space=True))
register_loss("grpo", LossSpec(grpo, min_generations=2))
