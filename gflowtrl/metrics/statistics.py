"""Distances between distributions, standard errors and confidence intervals."""

import numpy as np
import torch
from torch import Tensor


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Total variation of probabilities along the last axis, half their L1 distance: two `(..., N)` to `(...)`."""
    return (p - q).abs().sum(-1) / 2


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of probabilities along the last axis, in nats, between 0 and log 2."""
    middle = (p + q) / 2
    divergence = torch.special.entr(middle) - (torch.special.entr(p) + torch.special.entr(q)) / 2
    return divergence.sum(-1).clamp(min=0)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of per-user values `(U,)` and its standard error, which is NaN for a single user."""
    values = values.double()
    deviation = values.std().item() if len(values) > 1 else float("nan")
    return values.mean().item(), deviation / len(values) ** 0.5


def paired_bootstrap(a: Tensor, b: Tensor, samples: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Compute the 95 % confidence interval of mean(a - b) by resampling users (percentile bootstrap).

    Args:
        a, b: per-user values `(U,)` of two systems for the same users in the same order.
        samples: number of resamples.
        seed: seed of the resamples.

    Returns:
        `"mean_difference"`, `"low"` and `"high"`. The difference is significant if the interval excludes 0.

    Raises:
        ValueError: `a` and `b` have different shapes, or no users.
    """
    if a.shape != b.shape or a.dim() != 1 or not len(a):
        raise ValueError(f"a and b have shapes {tuple(a.shape)} and {tuple(b.shape)}; they need the same users.")
    difference = (a.double() - b.double()).cpu().numpy()
    # Users with the same difference are interchangeable, so a resample is a multinomial draw over distinct values.
    values, counts = np.unique(difference, return_counts=True)
    generator = np.random.default_rng(seed)
    chunk = max(1, 2**22 // len(values))
    means = [
        generator.multinomial(len(difference), counts / len(difference), size=min(chunk, samples - start)) @ values
        for start in range(0, samples, chunk)
    ]
    low, high = np.quantile(np.concatenate(means) / len(difference), [0.025, 0.975])
    return {"mean_difference": float(difference.mean()), "low": float(low), "high": float(high)}
