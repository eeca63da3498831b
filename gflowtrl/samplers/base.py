"""What a sampler is, what it returns, and how leaves are drawn without hidden state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrajectoryBatch:
    """Trajectories of a batch. On a prefix tree a leaf has one path, so a leaf is a trajectory.

    Attributes:
        leaves: `(B, K)` long.
        source: `(B, K)` long, which of the sampler's `source_names` drew it.
        log_q: `(B, K)` log-probability under the distribution that drew it (in a mixture: under its source's), or None
            where that is not known.
    """

    leaves: Tensor
    source: Tensor
    log_q: Tensor | None = None


class Sampler(ABC):
    """Draws K trajectories for each prompt. Objectives of GFlowNets are right for any sampler that reaches all leaves;
    which one is used decides how fast they learn, and where.

    Randomness comes from `noise` alone, a function of the row: the same row draws the same leaves in whatever batch.
    """

    source_names: tuple[str, ...] = ("unnamed",)

    @abstractmethod
    def sample(self, batch: Mapping[str, Any], policy: Any, num_generations: int, noise: Any) -> TrajectoryBatch:
        """Draw.

        Args:
            batch: prompts and dataset columns of B rows.
            policy: the policy in training, with its `catalog`.
            num_generations: K, all trajectories of a prompt.
            noise: `StatelessNoise(seed).at(step, row_ids)`.
        """


def draw_leaves(probabilities: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from categorical distributions by inverting their cumulative sums.

    Args:
        probabilities: `(B, N)`, >= 0, need not sum to one.
        uniforms: `(B, K)` in (0, 1).

    Returns:
        leaves `(B, K)` and their log-probabilities `(B, K)` float32.
    """
    # 64 bits: in 32 the sums of a million small numbers stand still, and items at the end are never drawn.
    sums = torch.cumsum(probabilities.double(), 1)
    total = sums[:, -1:]
    # Rounding must not reach the total itself, behind which no leaf lies.
    places = torch.minimum(uniforms.to(sums.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    leaves = torch.searchsorted(sums, places, right=True)
    return leaves, (probabilities.double().gather(1, leaves) / total).log().float()


def validate_trajectories(
    trajectories: TrajectoryBatch, batch_size: int, num_generations: int, num_leaves: int
) -> None:
    """Check what a sampler returned.

    Raises:
        TypeError: not a TrajectoryBatch of tensors.
        ValueError: wrong shape, numbers that are no integers, or a number that is no leaf; the error names the place.
    """
    if not isinstance(trajectories, TrajectoryBatch):
        raise TypeError(f"The sampler returned {type(trajectories).__name__}; it must return a TrajectoryBatch.")
    shape = (batch_size, num_generations)
    for name, values in (("leaves", trajectories.leaves), ("source", trajectories.source)):
        if not isinstance(values, Tensor):
            raise TypeError(f"The sampler returned {name} as {type(values).__name__}; it must be a tensor.")
        if values.shape != shape:
            raise ValueError(
                f"The sampler returned {name} of shape {tuple(values.shape)}; it must be {shape}: {batch_size} "
                f"prompts with num_generations={num_generations} trajectories each."
            )
        if values.dtype != torch.long:
            raise ValueError(f"The sampler returned {name} of {values.dtype}; they must be integers (torch.long).")
    if trajectories.log_q is not None and trajectories.log_q.shape != shape:
        raise ValueError(f"The sampler returned log_q of shape {tuple(trajectories.log_q.shape)}; it must be {shape}.")
    leaves = trajectories.leaves
    outside = (leaves < 0) | (leaves >= num_leaves)
    if outside.any():
        row, place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"The sampler returned {leaves[row, place].item()} as trajectory {place} of row {row}, which is not a "
            f"leaf: leaves are the numbers 0 to {num_leaves - 1}. Return leaves, not items, tokens or nodes "
            f"(catalog.leaf_of(items) gives the leaf of an item)."
        )
