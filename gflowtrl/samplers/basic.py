"""The samplers with one source each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gflowtrl.rewards import CollaborativeReward

from .base import Sampler, TrajectoryBatch, check_positive, check_share, draw_leaves


if TYPE_CHECKING:
    from gflowtrl.catalog import Item
    from gflowtrl.teachers import Teacher


def one_source(leaves: Tensor, log_q: Tensor | None = None) -> TrajectoryBatch:
    """The trajectories of a sampler with a single source."""
    return TrajectoryBatch(leaves, torch.zeros_like(leaves), log_q)


def device_of(batch: Mapping[str, Any]) -> torch.device:
    return batch["prompts"]["input_ids"].device


class GroundTruthSampler(Sampler):
    """The logged target, K times (in a mixture usually once); `log_q` is 0. Reads `target_leaf`, or `target`."""

    source_names = ("ground_truth",)

    def sample(self, batch: Mapping[str, Any], policy: Any, num_generations: int, noise: Any) -> TrajectoryBatch:
        if "target_leaf" not in batch and "target" not in batch:
            raise ValueError(
                "GroundTruthSampler needs the dataset column 'target'; choose another sampler without it."
            )
        target = batch["target_leaf"] if "target_leaf" in batch else policy.catalog.leaf_of(batch["target"])
        leaves = target.to(device_of(batch))[:, None].repeat(1, num_generations)
        return one_source(leaves, torch.zeros(leaves.shape, device=leaves.device))


class OnPolicySampler(Sampler):
    """The policy in training, tempered and mixed with the uniform choice of a child.

    Args:
        temperature: > 0; above 1 explores.
        epsilon: probability, at every step, of a child drawn uniformly.
    """

    source_names = ("on_policy",)

    def __init__(self, temperature: float = 1.0, epsilon: float = 0.0):
        check_positive("temperature", temperature, "OnPolicySampler")
        check_share("epsilon", epsilon, "OnPolicySampler")
        self.temperature, self.epsilon = temperature, epsilon

    def sample(self, batch: Mapping[str, Any], policy: Any, num_generations: int, noise: Any) -> TrajectoryBatch:
        leaves, log_q = policy.sample(
            batch["prompts"], num_generations, noise, temperature=self.temperature, epsilon=self.epsilon
        )
        return one_source(leaves, log_q)


class CollaborativeSampler(Sampler):
    """Items in proportion to `softmax(teacher's score / temperature)`, with replacement. Reads the column `history`.

    Args:
        teacher: a `gflowtrl.teachers.Teacher`, or any callable `histories -> (B, items)` in the catalogue's order.
        temperature: > 0; a high one draws from all items, a low one from the teacher's favourites.
    """

    source_names = ("collaborative",)

    def __init__(self, teacher: Teacher | Callable[[list[list[Item]]], Tensor], temperature: float = 1.0):
        self.distribution = CollaborativeReward(teacher, temperature)

    def sample(self, batch: Mapping[str, Any], policy: Any, num_generations: int, noise: Any) -> TrajectoryBatch:
        with torch.no_grad():
            items = self.distribution.bind(policy.catalog).score_items(batch)
            leaves = policy.catalog.fold_items(items.to(device_of(batch)))
        return one_source(*draw_leaves(leaves, noise.uniform("collaborative", num_generations)))


class UniformSampler(Sampler):
    """All leaves alike."""

    source_names = ("uniform",)

    def sample(self, batch: Mapping[str, Any], policy: Any, num_generations: int, noise: Any) -> TrajectoryBatch:
        size = policy.catalog.tree.num_leaves
        uniforms = noise.uniform("uniform", num_generations).to(device_of(batch))
        leaves = (uniforms * size).long().clamp(max=size - 1)
        return one_source(leaves, torch.full(leaves.shape, -math.log(size), device=leaves.device))


class RewardSampler(Sampler):
    """The target distribution itself, R / Z: the best source there is where all leaf rewards are known.

    Reads `leaf_log_rewards (B, N)`, which the trainer puts into the batch when every reward scores all items, or
    `top_rewards`, which takes its place where that table would be too large.

    Args:
        temperature: > 0; draws in proportion to R ** (1 / temperature).
    """

    source_names = ("reward",)

    def __init__(self, temperature: float = 1.0):
        check_positive("temperature", temperature, "RewardSampler")
        self.temperature = temperature

    def sample(self, batch: Mapping[str, Any], policy: Any, num_generations: int, noise: Any) -> TrajectoryBatch:
        top = batch.get("top_rewards")
        if top is None and batch.get("leaf_log_rewards") is None:
            raise ValueError(
                "RewardSampler needs the rewards of all leaves, but not every reward can score all items. Give the "
                "rewards a method score_items, or choose another sampler."
            )
        uniforms = noise.uniform("reward", num_generations)
        if top is None:
            return one_source(*draw_leaves(torch.softmax(batch["leaf_log_rewards"] / self.temperature, 1), uniforms))
        tempered = replace(
            top, log_rewards=top.log_rewards / self.temperature, log_rest=top.log_rest / self.temperature
        )
        return one_source(*tempered.draw(uniforms, policy.catalog.tree.num_leaves))


class FunctionSampler(Sampler):
    """A function `(batch, policy, num_generations, noise) -> leaves (B, K)`, or `-> TrajectoryBatch`, as a sampler."""

    def __init__(self, function: Callable[..., Tensor | TrajectoryBatch]):
        self.function = function
        self.source_names = (getattr(function, "__name__", type(function).__name__),)

    def sample(self, batch: Mapping[str, Any], policy: Any, num_generations: int, noise: Any) -> TrajectoryBatch:
        drawn = self.function(batch, policy, num_generations, noise)
        if isinstance(drawn, TrajectoryBatch):
            return drawn
        if not isinstance(drawn, Tensor):
            raise TypeError(
                f"The sampler {self.source_names[0]!r} returned {type(drawn).__name__}; it must return a tensor "
                f"of leaves (B, K) or a TrajectoryBatch."
            )
        return one_source(drawn)
