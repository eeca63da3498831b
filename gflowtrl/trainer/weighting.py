"""Weights of a prompt's trajectories: GFlowGR's "heuristic weighting" by source and by reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def source_table(source_weights: Mapping[str, float], source_names: Sequence[str]) -> Tensor:
    """Return the weight of each of the sampler's sources, by default 1: `(sources,)`.

    Raises:
        ValueError: a name is not one of the sampler's sources.
    """
    unknown = [name for name in source_weights if name not in source_names]
    if unknown:
        raise ValueError(
            f"source_weights names {', '.join(map(repr, unknown))}, but the sampler's sources are "
            f"{', '.join(map(repr, source_names))}. Use these names."
        )
    return torch.tensor([float(source_weights.get(name, 1.0)) for name in source_names])


def weights_by_source(table: Tensor, source: Tensor) -> Tensor:
    """Return the weights of `source (B, K)` in `table (sources,)`, with mean 1 within each prompt: `(B, K)`."""
    weights = table.to(source.device)[source]
    return weights / weights.mean(1, keepdim=True)


def weights_by_reward(log_rewards: Tensor) -> Tensor:
    """Return weights proportional to R within each prompt's group, with mean 1: `(B, K)`, K * softmax(log R)."""
    return log_rewards.shape[1] * log_rewards.softmax(1)


def effective_number(weights: Tensor) -> Tensor:
    """Return Kish's effective sample size of the trajectories, `(sum w)^2 / sum w^2`: `(B, K) -> (B,)`."""
    return weights.sum(1).square() / weights.square().sum(1)
