"""Trajectory balance with the partition function estimated from the group."""

from __future__ import annotations

from torch import Tensor

from .common import penalize, surplus


def vargrad(
    log_probs: Tensor,
    log_rewards: Tensor,
    huber_delta: float | None = None,
    penalty: str = "squared",
    linex_alpha: float | None = None,
) -> Tensor:
    """`(log Z + sum_l log pi(t_l | s_l) - log R(x, leaf))^2` with `log Z = mean_k(log R_k - log pi_k)` of the prompt.

    Averaged over the K trajectories this is the variance of log R - log pi, which is zero for every set of
    trajectories if and only if pi = R / Z. Only the policy is learned, and scaling R by a constant changes nothing.

    No gradient flows through the mean. For squared residuals with equal weights this changes nothing: the residuals
    sum to zero, so the two gradients are equal. With another penalty or weighted trajectories, log Z remains an
    estimate that the policy is pulled toward, instead of a term through which trajectories move each other.

    Args:
        log_probs: `(B, K, L)` tree-normalized log-probabilities of the tokens taken, 0 after a shorter id's end.
        log_rewards: `(B, K)`, finite.
        huber_delta: residuals beyond this size count linearly. None: all are squared.
        penalty, linex_alpha: `"squared"`, `"shifted_cosh"` or `"linex"` with its slope (`losses.common.penalize`).

    Returns:
        `(B, K)`, in nats squared.

    Raises:
        ValueError: a prompt has fewer than two trajectories. A single one equals its own mean and has no gradient.

    Relation to other losses: this is `trajectory_balance` with the estimated log Z. K times the sum over k equals the
    sum of the squared contrastive residuals over all pairs of the prompt.

    References:
        Richter et al., VarGrad: a low-variance gradient estimator for variational inference, NeurIPS 2020.
        Zhang et al., Robust scheduling with GFlowNets, ICLR 2023 (as a GFlowNet objective).
        Bartoldson et al., Trajectory balance with asynchrony (TBA), arXiv 2503.18929 (for language models).
    """
    balance = surplus(log_probs, log_rewards, compared_by="vargrad")
    return penalize(balance - balance.mean(1, keepdim=True).detach(), huber_delta, penalty, linex_alpha)
