"""Policy gradients with advantages within the group: GRPO and its relatives, for one update per group."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.checks import NOT_NEGATIVE, check_choice, check_number

from .common import expect_shape, real_steps


SCALES = ("group", "none")
TOKEN_AVERAGES = ("grpo", "bnpo", "dr_grpo")


def group_advantages(rewards: Tensor, scale_rewards: str = "group", epsilon: float = 1e-4) -> Tensor:
    """Return the advantages within each group: the rewards minus their mean, divided by their deviation.

    Args:
        rewards: `(B, K)`, any sign.
        scale_rewards: `"group"` divides by the sample deviation of the group plus `epsilon`, as in GRPO; `"none"` does
            not divide, as in Dr. GRPO (TRL's name and values; TRL's `"batch"` does not exist here).
        epsilon: added to the deviation.

    Returns:
        `(B, K)`, 0 if all rewards of a group are equal.
    """
    check_choice("scale_rewards", scale_rewards, SCALES)
    centered = rewards - rewards.mean(1, keepdim=True)
    # A rounded mean would otherwise be divided by the deviation that it causes: 8 rewards of 10.1 would have -.01.
    centered = centered.masked_fill(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0)
    return centered if scale_rewards == "none" else centered / (rewards.std(1, keepdim=True) + epsilon)


def grpo(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    lengths: Tensor,
    rewards: Tensor,
    beta: float = 1e-3,
    scale_rewards: str = "group",
    loss_type: str = "grpo",
    use_bias_correction_kl: bool = False,
) -> Tensor:
    """GRPO's policy gradient with one update per group, and the KL estimate `exp(d) - d - 1` with
    `d = log pi_ref - log pi`.

    With one update per group, the ratio of new to old policy is 1 and clipping never acts. So GSPO and ECPO are this
    loss, and DAPO and Dr. GRPO differ from it only by the options (docs/rivals.md).

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken.
        ref_log_probs: `(B, K, L)` log-probabilities of the reference model.
        lengths: `(B, K)` number of tokens of each id.
        rewards: `(B, K)` rewards before the transform to log R; `group_advantages` turns them into advantages.
        beta: weight of the KL estimate, >= 0 (TRL's name).
        scale_rewards: whether advantages are divided by the group's deviation, `"group"` or `"none"`.
        loss_type: how tokens are averaged (TRL's name and values). `"grpo"`: within each trajectory. `"bnpo"`: over
            all tokens of the micro-batch, as DAPO does over the whole batch. `"dr_grpo"`: their sum divided by L, the
            length of the catalog's longest id. Without ids of different lengths, all three are equal.
        use_bias_correction_kl: multiply the KL estimate by the ratio, as TRL does by default. Its value stays the
            same, and its gradient becomes that of the KL divergence (in expectation, on policy).

    Returns:
        `(B, K)`; its mean is the loss.

    References:
        Shao et al., DeepSeekMath, arXiv 2402.03300. With constrained beams as the group and `RankPenaltyReward` the
        defaults are the form used by ReRe.
        Yu et al., DAPO, arXiv 2503.14476.
        Liu et al., Understanding R1-Zero-like training (Dr. GRPO), arXiv 2503.20783.
    """
    check_number("beta", beta, NOT_NEGATIVE)
    check_choice("loss_type", loss_type, TOKEN_AVERAGES)
    expect_shape("ref_log_probs", ref_log_probs, log_probs.shape, "log_probs.shape")
    expect_shape("rewards", rewards, lengths.shape, "(prompts, trajectories)")
    ratio = on_policy_ratio(log_probs)
    difference = ref_log_probs - log_probs
    divergence = difference.exp() - difference - 1
    if use_bias_correction_kl:
        divergence = divergence * ratio
    tokens = beta * divergence - group_advantages(rewards, scale_rewards)[..., None] * ratio
    total = tokens.masked_fill(~real_steps(lengths, log_probs.shape[-1]), 0.0).sum(-1)
    if loss_type == "bnpo":
        return total * (lengths.numel() / lengths.sum())
    return total / (lengths if loss_type == "grpo" else log_probs.shape[-1])


def on_policy_ratio(log_probs: Tensor) -> Tensor:
    """Return the ratio of the policy to itself without gradient: 1, with the gradient of log pi."""
    return (log_probs - log_probs.detach()).exp()


def gbpo(log_probs: Tensor, lengths: Tensor, rewards: Tensor, importance_sampling_level: str = "token") -> Tensor:
    """OneRec's gradient-bounded policy optimization with one update per group: `-A pi / max(pi_old, bound)`, where the
    bound is pi for A >= 0 and 1 - pi for A < 0, without gradient.

    With one update per group pi_old = pi. So the gradient of log pi is -A for A >= 0, as in GRPO, and
    |A| pi / max(pi, 1 - pi) for A < 0: a token that is already improbable is pushed down less and less, where GRPO
    pushes with |A|.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken.
        lengths: `(B, K)` number of tokens of each id.
        rewards: `(B, K)` rewards before the transform to log R, which are used as advantages: positive for good items,
            negative for bad ones, 0 for those to ignore. They are not centered.
        importance_sampling_level: `"token"`: pi is the probability of a token, and the loss the mean over tokens.
            `"sequence"`: pi is that of the whole id, as the paper's formula says; 1 - pi is then nearly 1, and bad
            items get next to no gradient (TRL's name and values).

    Returns:
        `(B, K)`.

    References:
        OneRec-V2, arXiv 2508.20900. The authors' code is not public.
    """
    check_choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
    expect_shape("rewards", rewards, lengths.shape, "(prompts, trajectories)")
    log_probs = log_probs.masked_fill(~real_steps(lengths, log_probs.shape[-1]), 0.0)
    if importance_sampling_level == "sequence":
        log_probs, lengths = log_probs.sum(-1, keepdim=True), torch.ones_like(lengths)
    advantages, old = rewards[..., None], log_probs.detach()
    unlikely = torch.maximum(old.exp(), -torch.expm1(old))  # 1 - pi without loss of digits
    bound = torch.where(advantages >= 0, old, unlikely.log())
    tokens = -advantages * (log_probs - bound).exp()
    return tokens.masked_fill(~real_steps(lengths, log_probs.shape[-1]), 0.0).sum(-1) / lengths
