"""Contrastive balance: pairs of trajectories of one prompt, in which the partition function cancels."""

from __future__ import annotations

from torch import Tensor

from .common import penalize, surplus


def contrastive_balance(
    log_probs: Tensor,
    log_rewards: Tensor,
    delta: float | None = 1.0,
    penalty: str = "squared",
    linex_alpha: float | None = None,
) -> Tensor:
    """`mean over j != i of Huber((log pi_i - log pi_j) - (log R_i - log R_j))` over other trajectories j of a prompt.

    The loss is zero for every set of trajectories if and only if pi = R / Z. Only the policy is learned, and scaling R
    by a constant changes nothing. A trajectory with an outlier reward affects only its own K - 1 pairs, and only
    linearly beyond `delta`; in `vargrad` it moves the mean that all trajectories are compared with.

    Args:
        log_probs: `(B, K, L)` tree-normalized log-probabilities of the tokens taken, 0 after a shorter id's end.
        log_rewards: `(B, K)`, finite.
        delta: residuals beyond this size, in nats, count linearly. None: all are squared.
        penalty, linex_alpha: `"squared"`, `"shifted_cosh"` or `"linex"` with its slope (`losses.common.penalize`); the
            last two need `delta=None`. Both orders of a pair count, so linex with slope 1 is half of shifted cosh.

    Returns:
        `(B, K)`, in nats squared.

    Raises:
        ValueError: a prompt has fewer than two trajectories, so no pair exists.

    Relation to other losses: with squared residuals, `(K - 1) / 2` times the sum over i (the sum over unordered pairs)
    equals K times the sum of `vargrad` over the prompt's trajectories, in value and in gradient. So without Huber the
    means of the two losses differ only by the factor 2 K / (K - 1).

    References:
        da Silva et al., Embarrassingly parallel GFlowNets, ICML 2024 (the contrastive balance condition).
    """
    balance = surplus(log_probs, log_rewards, compared_by="contrastive_balance")
    residuals = balance[:, :, None] - balance[:, None, :]
    return penalize(residuals, delta, penalty, linex_alpha, "delta").sum(-1) / (balance.shape[1] - 1)  # i = j adds 0
