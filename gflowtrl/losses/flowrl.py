"""FlowRL: trajectory balance with means over tokens, group advantages as rewards and the reference in the target."""

from __future__ import annotations

from torch import Tensor

from gflowtrl.checks import POSITIVE, check_number

from .common import expect_shape, real_steps
from .policy_gradient import group_advantages


def flowrl(
    log_probs: Tensor, ref_log_probs: Tensor, lengths: Tensor, rewards: Tensor, log_z: Tensor, beta: float = 15.0
) -> Tensor:
    """`(log Z(x) + mean_l log pi(t_l | s_l) - beta A - mean_l log pi_ref(t_l | s_l))^2`, with the advantage A of the
    reward within its group.

    With one update per group, the clipped importance weight of the authors' code is 1. The loss is zero for every
    trajectory if and only if pi = pi_ref (exp(beta A) / Z)^n for ids of n tokens: the means multiply the exponent by
    n. A is that of the group, so the target depends on what else was drawn.

    Args:
        log_probs: `(B, K, L)` log-probabilities of the tokens taken.
        ref_log_probs: `(B, K, L)` log-probabilities of the reference model.
        lengths: `(B, K)` number of tokens of each id.
        rewards: `(B, K)` rewards before the transform to log R.
        log_z: `(B,)` learned log Z(x). The authors' head has three layers on the mean hidden state of the prompt and
            the policy's learning rate (`log_z_learning_rate`); here it is that of `trajectory_balance`.
        beta: scale of the advantages, > 0.

    Returns:
        `(B, K)`, in nats squared.

    References:
        FlowRL, arXiv 2509.15207.
    """
    check_number("beta", beta, POSITIVE)
    expect_shape("ref_log_probs", ref_log_probs, log_probs.shape, "log_probs.shape")
    expect_shape("rewards", rewards, log_probs.shape[:2], "(prompts, trajectories)")
    expect_shape("log_z", log_z, log_probs.shape[:1], "(prompts,)")
    real = real_steps(lengths, log_probs.shape[-1])
    gain = (log_probs - ref_log_probs).masked_fill(~real, 0.0).sum(-1) / lengths
    return (log_z[:, None] + gain - beta * group_advantages(rewards, epsilon=1e-6)).square()
