"""Sibling-GRPO: advantages among the children of one prefix, at every step of the tree."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowtrl.checks import NOT_NEGATIVE, check_choice, check_number

from .common import expect_shape, real_steps
from .policy_gradient import on_policy_ratio


MOST_DIVERGENCE = 100.0  # of a token, as in the authors' code


def sibling_grpo(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    lengths: Tensor,
    rewards: Tensor,
    prefix_nodes: Tensor,
    beta: float = 0.0,
    variant: str = "code",
) -> Tensor:
    """Policy gradient of each token with an advantage among its siblings (V-STAR), with one update per group.

    The siblings of a token are the distinct tokens that the prompt's trajectories take after the same prefix
    (`sibling_advantages`). A token without a sibling adds nothing. Meant in addition to `grpo`.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken.
        ref_log_probs: `(B, K, L)` log-probabilities of the reference model.
        lengths: `(B, K)` number of tokens of each id.
        rewards: `(B, K)` rewards before the transform to log R.
        prefix_nodes: `(B, K, L)` node reached by each token, -1 after the end of an id.
        beta: weight of the KL estimate of tokens with an advantage, >= 0; only for `variant="code"`, which uses 1e-3.
        variant: `"code"`: the authors' code, the mean over all tokens of the micro-batch that have an advantage.
            `"paper"`: equation 19, the sum over the nodes of the prompt's trajectories divided by K. Each node counts
            once, and its gradient is shared evenly by the trajectories through it; the value is 0.

    Returns:
        `(B, K)`; its mean is the loss.

    References:
        V-STAR, KDD 2026. Its code compares equal prefixes of different prompts, too; here, as in the paper, only those
        of one prompt.
    """
    check_number("beta", beta, NOT_NEGATIVE)
    check_choice("variant", variant, ("code", "paper"))
    if beta and variant == "paper":
        raise ValueError(f"beta is {beta}, but variant='paper' has no KL term; leave beta out, or use variant='code'.")
    expect_shape("ref_log_probs", ref_log_probs, log_probs.shape, "log_probs.shape")
    real = real_steps(lengths, log_probs.shape[-1])
    advantages, sharing = sibling_advantages(rewards, prefix_nodes)
    counts = real & (advantages != 0)
    policy = -advantages * on_policy_ratio(log_probs)
    if variant == "paper":
        return (policy / sharing).masked_fill(~counts, 0.0).sum(-1)
    difference = ref_log_probs - log_probs
    divergence = (difference.exp() - difference - 1).clamp(max=MOST_DIVERGENCE)
    total = (policy + beta * divergence).masked_fill(~counts, 0.0).sum(-1)
    return total * (lengths.numel() / counts.sum().clamp(min=1))


def sibling_advantages(rewards: Tensor, prefix_nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the advantage of each token among its siblings, and how many trajectories take it.

    The value of a node is the mean reward of the prompt's trajectories through it. The advantage of a node is its
    value minus the mean of its siblings' values and its own, divided by their (population) deviation plus 1e-4, where
    each distinct node counts once.

    Args:
        rewards: `(B, K)`.
        prefix_nodes: `(B, K, L)` node reached by each token, -1 after the end of an id.

    Returns:
        Advantages `(B, K, L)`, 0 without siblings, if all siblings have the same value, and after the end of an id;
        and numbers `(B, K, L)`, at least 1.
    """
    expect_shape("rewards", rewards, prefix_nodes.shape[:2], "(prompts, trajectories)")
    same = _equal_pairs(prefix_nodes)
    parents = torch.cat([torch.zeros_like(prefix_nodes[..., :1]), prefix_nodes[..., :-1]], -1)
    sharing = same.sum(2).clamp(min=1)
    value = (same * rewards[:, None, :, None]).sum(2) / sharing
    # Weights of the trajectories j of a prefix such that each distinct child counts once.
    once = (_equal_pairs(parents) & (prefix_nodes >= 0)[:, None]) / sharing[:, None]
    siblings = once.sum(2).clamp(min=1)
    mean = (once * value[:, None]).sum(2) / siblings
    deviation = ((once * (value[:, None] - mean[:, :, None]).square()).sum(2) / siblings).sqrt()
    rounding = 1e-6 * (1 + mean.abs())  # equal values whose means were rounded
    advantages = (value - mean) / (deviation + 1e-4)
    return advantages.masked_fill((deviation <= rounding) | (prefix_nodes < 0), 0.0), sharing


def _equal_pairs(nodes: Tensor) -> Tensor:
    """Return which pairs of trajectories have the same node: `(B, K, L) -> bool (B, K, K, L)`, never for -1."""
    return (nodes[:, :, None] == nodes[:, None]) & (nodes >= 0)[:, :, None]
