"""Detailed balance and subtrajectory balance, with a learned flow at every state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gflowtrl.checks import POSITIVE, check_number

from .common import expect_shape, penalize, real_steps


def detailed_balance(
    log_probs: Tensor,
    log_flows: Tensor,
    log_rewards: Tensor,
    lengths: Tensor,
    huber_delta: float | None = None,
    penalty: str = "squared",
    linex_alpha: float | None = None,
) -> Tensor:
    """`sum_l (log F(s_l) + log pi(t_{l+1} | s_l) - log F(s_{l+1}))^2` with `log F(leaf) = log R`, as in GFlowGR.

    The loss is zero for every trajectory if and only if pi = R / Z and F is the true flow (F(s) = sum of R over the
    leaves below s); then log F(root) = log Z. Each step learns only from its neighbors, so the reward of a leaf
    reaches the first token through the flows in between. This is slower than `trajectory_balance`: a loss of c^2
    bounds the total variation to R / Z by no less than 1 - exp(-2 sqrt(L) c).

    Args:
        log_probs: `(B, K, L)` tree-normalized log-probabilities of the tokens taken.
        log_flows: `(B, K, L)` learned log F of the states s_0 ... s_{L-1}. Use a learning rate of 10 to 100 times the
            policy's.
        log_rewards: `(B, K)`, finite.
        lengths: `(B, K)` number of tokens of each id; later steps add 0, whatever their values.
        huber_delta: residuals beyond this size count linearly. None: all are squared.
        penalty, linex_alpha: `"squared"`, `"shifted_cosh"` or `"linex"` with its slope (`losses.common.penalize`).

    Returns:
        `(B, K)`, in nats squared, summed over the steps.

    Relation to other losses: the L residuals of a trajectory add up to the residual of `trajectory_balance` with
    log Z = log F(root), so its square is at most L times this loss.

    References:
        Bengio et al., GFlowNet foundations, JMLR 2023 (detailed balance).
        GFlowGR, arXiv 2506.16114.
    """
    potentials = _potentials(log_probs, log_flows, log_rewards, lengths)
    residuals = potentials[..., :-1] - potentials[..., 1:]
    return penalize(residuals, huber_delta, penalty, linex_alpha).sum(-1)


def subtrajectory_balance(
    log_probs: Tensor,
    log_flows: Tensor,
    log_rewards: Tensor,
    lengths: Tensor,
    lam: float = 0.9,
    huber_delta: float | None = None,
    penalty: str = "squared",
    linex_alpha: float | None = None,
) -> Tensor:
    """`sum lam^(j-i) d_ij^2 / sum lam^(j-i)` over all sub-paths `0 <= i < j <= length` of a trajectory, with
    `d_ij = log F(s_i) + sum of log pi from s_i to s_j - log F(s_j)` and `log F(leaf) = log R`.

    The loss is zero for every trajectory if and only if pi = R / Z and F is the true flow. Long sub-paths propagate a
    reward further; short ones have less noise. It helps on long sequences and gains little on ids of 3 to 5 tokens.

    Args:
        log_probs, log_flows, log_rewards, lengths: as for `detailed_balance`.
        lam: > 0. A small value approaches the mean over the steps of `detailed_balance`; a large one approaches
            `trajectory_balance` with log Z = log F(root). With 1, all sub-paths have the same weight.
        huber_delta: residuals beyond this size count linearly. None: all are squared.
        penalty, linex_alpha: `"squared"`, `"shifted_cosh"` or `"linex"` with its slope (`losses.common.penalize`).

    Returns:
        `(B, K)`, in nats squared, the weighted mean over the sub-paths.

    Raises:
        ValueError: `lam` is not a positive number.

    References:
        Madan et al., Learning GFlowNets from partial episodes for improved convergence and stability, ICML 2023.
    """
    check_number("lam", lam, POSITIVE)
    potentials = _potentials(log_probs, log_flows, log_rewards, lengths)
    num_states = potentials.shape[-1]
    state = torch.arange(num_states, device=potentials.device)
    gap = state[None, :] - state[:, None]  # j - i
    real = real_steps(lengths + 1, num_states)[..., None, :] & (gap > 0)
    # A softmax divides by the sum of all weights, so that powers of a large lam cannot overflow.
    weights = (gap * math.log(lam)).to(potentials.dtype).expand(real.shape).masked_fill(~real, -torch.inf)
    weights = weights.flatten(-2).softmax(-1).view(real.shape)
    residuals = potentials[..., :, None] - potentials[..., None, :]
    residuals = residuals.masked_fill(~real, 0.0)
    return (weights * penalize(residuals, huber_delta, penalty, linex_alpha)).sum((-2, -1))


def _potentials(log_probs: Tensor, log_flows: Tensor, log_rewards: Tensor, lengths: Tensor) -> Tensor:
    """Return `u_l = log F(s_l) - sum of log pi up to s_l`, `(B, K, L + 1)`. The residual of a sub-path is `u_i - u_j`.

    `u_length` uses log R. Later entries repeat it, so that steps after the end of an id have residual 0.
    """
    expect_shape("log_flows", log_flows, log_probs.shape, "log_probs.shape")
    expect_shape("log_rewards", log_rewards, log_probs.shape[:2], "(prompts, trajectories)")
    expect_shape("lengths", lengths, log_probs.shape[:2], "(prompts, trajectories)")
    real = real_steps(lengths, log_probs.shape[2])
    reached = log_probs.masked_fill(~real, 0.0).cumsum(-1)
    inner = torch.where(real, log_flows, log_rewards[..., None])
    flows = torch.cat([inner, log_rewards[..., None]], -1)
    return flows - torch.nn.functional.pad(reached, (1, 0))
