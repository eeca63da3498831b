"""Balance at every step, with a learned flow at every state: detailed balance and its generalization to sub-paths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gflowtrl.checks import POSITIVE, check_number

from .common import expect_shape, penalty, real_steps


def detailed_balance(
    log_probs: Tensor, log_flows: Tensor, log_rewards: Tensor, lengths: Tensor, huber_delta: float | None = None
) -> Tensor:
    """`sum_l (log F(s_l) + log pi(t_{l+1} | s_l) - log F(s_{l+1}))^2` with `log F(leaf) = log R`, as in GFlowGR.

    Zero for every trajectory if and only if pi = R / Z and F is the true flow, F(s) = the sum of R over the leaves
    below s; then log F(root) = log Z. A step learns from its neighbors only, so what a leaf's reward says reaches the
    first token through the flows in between: slower than `trajectory_balance`, and a loss of c^2 bounds the total
    variation to R / Z by no less than 1 - exp(-2 sqrt(L) c).

    Args:
        log_probs: `(B, K, L)` tree-normalized log-probabilities of the tokens taken.
        log_flows: `(B, K, L)` log F of the states s_0 ... s_{L-1}, learned; their learning rate wants to be 10 to 100
            times the policy's.
        log_rewards: `(B, K)`, finite.
        lengths: `(B, K)` number of tokens of each id; later steps add 0, whatever stands there.
        huber_delta: residuals beyond this size count linearly; None squares all of them.

    Returns:
        `(B, K)`, in nats squared, summed over the steps.

    Relation to other losses: the L residuals of a trajectory add up to the one of `trajectory_balance` with
    log Z = log F(root), whose square therefore is at most L times this loss.

    References:
        Bengio et al., GFlowNet foundations, JMLR 2023 (detailed balance).
        GFlowGR, arXiv 2506.16114.
    """
    potentials = _potentials(log_probs, log_flows, log_rewards, lengths)
    residuals = potentials[..., :-1] - potentials[..., 1:]
    return penalty(residuals, huber_delta).sum(-1)


def subtrajectory_balance(
    log_probs: Tensor,
    log_flows: Tensor,
    log_rewards: Tensor,
    lengths: Tensor,
    lam: float = 0.9,
    huber_delta: float | None = None,
) -> Tensor:
    """`sum lam^(j-i) d_ij^2 / sum lam^(j-i)` over all sub-paths `0 <= i < j <= length` of a trajectory, with
    `d_ij = log F(s_i) + sum of log pi from s_i to s_j - log F(s_j)` and `log F(leaf) = log R`.

    Zero for every trajectory if and only if pi = R / Z and F is the true flow. Long sub-paths carry a reward further,
    short ones have less noise; it pays off on long sequences and has little to gain on ids of 3 to 5 tokens.

    Args:
        log_probs, log_flows, log_rewards, lengths: as for `detailed_balance`.
        lam: > 0. A small one tends to the mean over the steps of `detailed_balance`, a large one to
            `trajectory_balance` with log Z = log F(root); at 1 all sub-paths weigh the same.
        huber_delta: residuals beyond this size count linearly; None squares all of them.

    Returns:
        `(B, K)`, in nats squared, a mean over the sub-paths.

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
    # The division by the sum of all weights as a softmax: no power of a large lam can overflow.
    weights = (gap * math.log(lam)).to(potentials.dtype).expand(real.shape).masked_fill(~real, -torch.inf)
    weights = weights.flatten(-2).softmax(-1).view(real.shape)
    residuals = potentials[..., :, None] - potentials[..., None, :]
    return (weights * penalty(residuals.masked_fill(~real, 0.0), huber_delta)).sum((-2, -1))


def _potentials(log_probs: Tensor, log_flows: Tensor, log_rewards: Tensor, lengths: Tensor) -> Tensor:
    """`u_l = log F(s_l) - sum of log pi up to s_l`: `(B, K, L + 1)`, so that every sub-path's residual is `u_i - u_j`.

    `u_length` holds log R; behind it the value is repeated, so that steps after the end of an id have residual 0.
    """
    batch, num_generations, num_steps = log_probs.shape
    expect_shape("log_flows", log_flows, log_probs.shape, "log_probs.shape")
    expect_shape("log_rewards", log_rewards, (batch, num_generations), "(prompts, trajectories)")
    expect_shape("lengths", lengths, (batch, num_generations), "(prompts, trajectories)")
    real = real_steps(lengths, num_steps)
    reached = log_probs.masked_fill(~real, 0.0).cumsum(-1)
    inner = torch.where(real, log_flows, log_rewards[..., None])
    flows = torch.cat([inner, log_rewards[..., None]], -1)
    return flows - torch.nn.functional.pad(reached, (1, 0))
