"""Balance between the trajectories of one prompt, pair by pair: the partition function cancels."""

from __future__ import annotations

from torch import Tensor

from .common import penalty, surplus


def contrastive_balance(log_probs: Tensor, log_rewards: Tensor, delta: float | None = 1.0) -> Tensor:
    """`mean over j != i of Huber((log pi_i - log pi_j) - (log R_i - log R_j))`, the prompt's other trajectories j.

    Zero for every set of trajectories if and only if pi = R / Z. Nothing is learned beside the policy, and a factor on
    R changes nothing. One trajectory with an odd reward spoils its own K - 1 pairs, linearly beyond `delta`, and not
    the others; in `vargrad` it moves the mean that all are compared with.

    Args:
        log_probs: `(B, K, L)` tree-normalized log-probabilities of the tokens taken, 0 after a shorter id's end.
        log_rewards: `(B, K)`, finite.
        delta: residuals beyond this size, in nats, count linearly (`losses.common.penalty`); None squares all.

    Returns:
        `(B, K)`, in nats squared.

    Raises:
        ValueError: fewer than two trajectories a prompt; there is no pair.

    Relation to other losses: squared, `(K - 1) / 2` times the sum over i, which is the sum over unordered pairs, is K
    times the sum of `vargrad` over the prompt's trajectories, in value and in gradient. So without Huber the means of
    the two differ by the factor 2 K / (K - 1) alone.

    References:
        da Silva et al., Embarrassingly parallel GFlowNets, ICML 2024 (the contrastive balance condition).
    """
    balance = surplus(log_probs, log_rewards, compared_by="contrastive_balance")
    residuals = balance[:, :, None] - balance[:, None, :]
    return penalty(residuals, delta, "delta").sum(-1) / (balance.shape[1] - 1)  # i = j adds 0
