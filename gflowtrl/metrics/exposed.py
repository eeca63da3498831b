"""Metrics of a ranking of randomly exposed items, some of which the user liked."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .statistics import mean_and_error


K = 5  # cutoff that the literature on these data uses
EXPOSED_METRICS = (f"ndcg@{K}", f"recall@{K}", "auc")


def exposed_metrics(scores: Tensor, liked: Tensor, k: int = K) -> dict[str, Tensor]:
    """Compute NDCG, recall and AUC of each user's own candidates.

    Candidates with the same score, such as items with the same semantic id, have an unknown order: NDCG and recall are
    expectations over all orders, and a tie of a liked and another item counts 1/2 in the AUC.

    Args:
        scores: float `(U, C)`; higher is better, -inf is last. Those of padding do not count.
        liked: `(U, C)`, 1 for liked and 0 for other candidates, negative for padding.
        k: cutoff.

    Returns:
        Double tensors `(U,)`: `"ndcg@k"` (DCG / ideal DCG), `"recall@k"` (liked items within the first k / liked
        items), both NaN for users without a liked candidate, and `"auc"`, NaN for users without both kinds.

    Raises:
        ValueError: the shapes differ, or a score is NaN or +inf.
    """
    if scores.shape != liked.shape or scores.dim() != 2:
        raise ValueError(f"scores and liked have shapes {tuple(scores.shape)} and {tuple(liked.shape)}, not (U, C).")
    present = liked >= 0
    given = scores[present]
    if bool((given.isnan() | (given == torch.inf)).any()):
        raise ValueError("A score of a candidate is NaN or +inf. Give numbers, or -inf for the end of the list.")
    least = torch.finfo(torch.double).min  # of -inf: above the padding
    scores = scores.double().clamp(min=least).masked_fill(~present, -torch.inf)
    ordered = scores.sort(1).values
    above = scores.shape[1] - torch.searchsorted(ordered, scores, right=True)
    ties = scores.shape[1] - above - torch.searchsorted(ordered, scores)
    positive = (liked == 1).double()
    likes = positive.sum(1)
    discounts = 1 / torch.log2(torch.arange(k, dtype=torch.double, device=scores.device) + 2)
    totals = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)])  # of the first p positions
    gains = (totals[(above + ties).clamp(max=k)] - totals[above.clamp(max=k)]) / ties
    hits = torch.minimum((k - above).clamp(min=0), ties) / ties
    others = present.sum(1) - likes
    # The sum of the liked candidates' ranks, from the lowest score, is the Mann-Whitney statistic.
    ranks = present.sum(1, keepdim=True) - above - (ties - 1) / 2
    wins = (positive * ranks).sum(1) - likes * (likes + 1) / 2
    return {
        f"ndcg@{k}": (positive * gains).sum(1) / totals[likes.long().clamp(max=k)],
        f"recall@{k}": (positive * hits).sum(1) / likes,
        "auc": wins / (likes * others),
    }


def mean_over_users(per_user: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the means and standard errors of metrics `(U,)` over the users for whom each one is defined, without
    metrics that are defined for nobody."""
    known = {name: values[~values.isnan()] for name, values in per_user.items()}
    found = {name: mean_and_error(values) for name, values in known.items() if len(values)}
    return {name: mean for name, (mean, _) in found.items()}, {name: error for name, (_, error) in found.items()}


def inverse_propensities(impressions: Tensor, clip: float = 100.0) -> Tensor:
    """Return how much a like of each item counts if the log had shown all items equally often.

    Args:
        impressions: `(items,)`, how often each item was shown. Items that were never shown count as shown once.
        clip: largest weight; the variance of an estimate grows with it.

    Returns:
        `(items,)`, the mean number of impressions divided by that of each item, at most `clip`.
    """
    shown = impressions.double().clamp(min=1)
    return (shown.mean() / shown).clamp(max=clip)


def debiased_estimates(values: Tensor, weights: Tensor) -> dict[str, tuple[float, float]]:
    """Estimate the mean of a metric under random exposure from a log (Schnabel et al., ICML 2016, section 3).

    Args:
        values: `(U,)` the metric of each user's logged target.
        weights: `(U,)` inverse propensities of the targets.

    Returns:
        Estimate and standard error: `"ips"` (the weighted mean, unbiased for exact propensities) and `"snips"`
        (divided by the mean weight: biased, with less variance; delta method).
    """
    values, weights = values.double(), weights.double()
    snips = float((weights * values).sum() / weights.sum())
    error = float((weights * (values - snips)).square().sum().sqrt() / weights.sum())
    return {"ips": mean_and_error(weights * values), "snips": (snips, error)}


def estimates_of(per_user: dict[str, Tensor], names: Sequence[str], weights: Tensor) -> dict[str, tuple[float, float]]:
    """Return the estimates of some metrics with their standard errors, as `"ips_<name>"` and `"snips_<name>"`."""
    found = {name: debiased_estimates(per_user[name], weights) for name in names}
    return {f"{kind}_{name}": value for name, both in found.items() for kind, value in both.items()}
