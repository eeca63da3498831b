"""Comparing distributions, and saying how sure a difference is."""

import numpy as np
import torch
from torch import Tensor


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the L1 distance of probabilities along the last axis: `(..., N)` twice to `(...)`, between 0 and 1."""
    return (p - q).abs().sum(-1) / 2


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of probabilities along the last axis, in nats: between 0 and log 2."""
    middle = (p + q) / 2
    divergence = torch.special.entr(middle) - (torch.special.entr(p) + torch.special.entr(q)) / 2
    return divergence.sum(-1).clamp(min=0)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of per-user values `(U,)`, and its standard error (NaN for one user)."""
    values = values.double()
    spread = values.std().item() if len(values) > 1 else float("nan")
    return values.mean().item(), spread / len(values) ** 0.5


def paired_bootstrap(
    a: Tensor, b: Tensor, samples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> dict[str, float]:
    """Confidence interval of mean(a - b) by resampling users (percentile bootstrap).

    Args:
        a, b: per-user values `(U,)` of two systems on the same users in the same order.
        samples: number of resamples.
        confidence: mass of the interval.

    Returns:
        `"mean_difference"`, `"low"`, `"high"`. The difference is significant where the interval excludes 0.
    """
    if a.shape != b.shape or a.dim() != 1 or not len(a):
        raise ValueError(f"a and b must be of the same users, but have shapes {tuple(a.shape)} and {tuple(b.shape)}.")
    difference = (a.double() - b.double()).cpu().numpy()
    # Users with the same difference are interchangeable: a resample is a multinomial draw over the distinct values.
    values, counts = np.unique(difference, return_counts=True)
    generator = np.random.default_rng(seed)
    chunk = max(1, 2**22 // len(values))
    means = [
        generator.multinomial(len(difference), counts / len(difference), size=min(chunk, samples - start)) @ values
        for start in range(0, samples, chunk)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means) / len(difference), [tail, 1 - tail])
    return {"mean_difference": float(difference.mean()), "low": float(low), "high": float(high)}
