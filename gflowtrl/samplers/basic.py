"""The samplers with one source each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gflowtrl.checks import POSITIVE, SHARE, check_number
from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import CollaborativeReward, StepReward, draw_leaves

from .sampler import Sampler, Trajectories


if TYPE_CHECKING:
    from gflowtrl.catalog import Item
    from gflowtrl.teachers import Teacher


class GroundTruthSampler(Sampler):
    """The logged target, K times (in a mixture usually once); `log_q` is 0."""

    source_names = ("ground_truth",)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        leaves = step.target_leaves[:, None].repeat(1, num_generations)
        return Trajectories.of_one_source(leaves, torch.zeros(leaves.shape, device=leaves.device))


class OnPolicySampler(Sampler):
    """The policy in training, tempered and mixed with the uniform choice of a child.

    Args:
        temperature: > 0; above 1 explores.
        epsilon: probability, at every step, of a child drawn uniformly.
    """

    source_names = ("on_policy",)

    def __init__(self, temperature: float = 1.0, epsilon: float = 0.0):
        check_number("The temperature of OnPolicySampler", temperature, POSITIVE)
        check_number("The epsilon of OnPolicySampler", epsilon, SHARE)
        self.temperature, self.epsilon = temperature, epsilon

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        leaves, log_q = policy.sample(
            step.prompts, num_generations, noise, temperature=self.temperature, epsilon=self.epsilon
        )
        return Trajectories.of_one_source(leaves, log_q)


class CollaborativeSampler(Sampler):
    """Items in proportion to `softmax(teacher's score / temperature)`, with replacement. Reads the column `history`.

    Args:
        teacher: a `gflowtrl.teachers.Teacher`, or any callable `histories -> (B, items)` in the catalog's order.
        temperature: > 0; a high one draws from all items, a low one from the teacher's favorites.
    """

    source_names = ("collaborative",)

    def __init__(self, teacher: Teacher | Callable[[Sequence[Sequence[Item]]], Any], temperature: float = 1.0):
        self.distribution = CollaborativeReward(teacher, temperature)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        with torch.no_grad():
            items = self.distribution.bind(policy.catalog).score_items(step)
            leaves = policy.catalog.fold_items(items.to(step.device))
        return Trajectories.of_one_source(*draw_leaves(leaves, noise.uniform("collaborative", num_generations)))


class UniformSampler(Sampler):
    """All leaves alike."""

    source_names = ("uniform",)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        size = policy.catalog.tree.num_leaves
        uniforms = noise.uniform("uniform", num_generations).to(step.device)
        leaves = (uniforms * size).long().clamp(max=size - 1)
        return Trajectories.of_one_source(leaves, torch.full(leaves.shape, -math.log(size), device=leaves.device))


class RewardSampler(Sampler):
    """The target distribution itself, R / Z: the best source there is where all leaf rewards are known.

    Args:
        temperature: > 0; draws in proportion to R ** (1 / temperature).
    """

    source_names = ("reward",)

    def __init__(self, temperature: float = 1.0):
        check_number("The temperature of RewardSampler", temperature, POSITIVE)
        self.temperature = temperature

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        if reward is None:
            raise ValueError("RewardSampler draws in proportion to R, but there is no reward; give reward_funcs.")
        return Trajectories.of_one_source(*reward.sample(num_generations, noise, self.temperature))


class FunctionSampler(Sampler):
    """A function `(step, policy, reward, num_generations, noise)`, which returns leaves `(B, K)` or `Trajectories`."""

    def __init__(self, function: Callable[..., Tensor | Trajectories]):
        self.function = function
        self.source_names = (getattr(function, "__name__", type(function).__name__),)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        drawn = self.function(step, policy, reward, num_generations, noise)
        if isinstance(drawn, Trajectories):
            return drawn
        if not isinstance(drawn, Tensor):
            raise TypeError(
                f"The sampler {self.source_names[0]!r} returned {type(drawn).__name__}; it must return a tensor "
                f"of leaves (B, K) or a Trajectories."
            )
        return Trajectories.of_one_source(drawn)
