"""Trajectory balance with a learned partition function."""

from __future__ import annotations

from torch import Tensor

from .common import expect_shape, penalize, surplus


def trajectory_balance(
    log_probs: Tensor,
    log_rewards: Tensor,
    log_z: Tensor,
    huber_delta: float | None = None,
    penalty: str = "squared",
    linex_alpha: float | None = None,
) -> Tensor:
    """`(log Z(x) + sum_l log pi(t_l | s_l) - log R(x, leaf))^2`: the better of GFlowGR's two objectives.

    The loss is zero for every trajectory if and only if pi = R / Z and `log_z` is the true log Z, whatever
    distribution the trajectories come from. On policy, its expected gradient is twice that of KL(pi || R / Z).

    Args:
        log_probs: `(B, K, L)` tree-normalized log-probabilities of the tokens taken, 0 after a shorter id's end.
        log_rewards: `(B, K)`, finite.
        log_z: `(B,)` learned log Z(x), one per prompt: a single constant cannot fit two prompts with different Z. Use
            a learning rate of 10 to 100 times the policy's.
        huber_delta: residuals beyond this size count linearly. None: all are squared.
        penalty, linex_alpha: `"squared"`, `"shifted_cosh"` or `"linex"` with its slope (`losses.common.penalize`).

    Returns:
        `(B, K)`, in nats squared.

    Relation to other losses: `vargrad` estimates log Z from the prompt's trajectories; `exact_flow` needs no log Z.

    References:
        Malkin et al., Trajectory balance: improved credit assignment in GFlowNets, NeurIPS 2022.
        Malkin et al., GFlowNets and variational inference, ICLR 2023 (the on-policy gradient).
        GFlowGR, arXiv 2506.16114.
    """
    expect_shape("log_z", log_z, log_probs.shape[:1], "(prompts,)")
    return penalize(log_z[:, None] + surplus(log_probs, log_rewards), huber_delta, penalty, linex_alpha)
