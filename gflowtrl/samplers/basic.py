"""Samplers with a single source."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import POSITIVE, SHARE, check_number
from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import CollaborativeReward, StepReward, draw_leaves
from gflowtrl.rewards.exclusion import as_mask
from gflowtrl.teachers import Teacher

from .leaf_sets import draw_allowed
from .sampler import Sampler, Trajectories


class GroundTruthSampler(Sampler):
    """The logged target, K times (usually once in a mixture). `log_q` is 0."""

    source_names = ("ground_truth",)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        leaves = step.target_leaves[:, None].repeat(1, num_generations)
        return Trajectories.of_one_source(leaves, torch.zeros(leaves.shape, device=leaves.device))


class OnPolicySampler(Sampler):
    """Draws from the policy in training, with a temperature and a share of uniform steps.

    Args:
        temperature: > 0; values above 1 explore.
        epsilon: probability at every step that the child is drawn uniformly.
    """

    source_names = ("on_policy",)

    def __init__(self, temperature: float = 1.0, epsilon: float = 0.0):
        check_number("The temperature of OnPolicySampler", temperature, POSITIVE)
        check_number("The epsilon of OnPolicySampler", epsilon, SHARE)
        self.temperature, self.epsilon = temperature, epsilon

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: Mapping[str, Any]) -> Self:
        return cls(**{"temperature": context["temperature"], "epsilon": context["epsilon"], **spec})

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        leaves, log_q = policy.sample(
            step.prompts, num_generations, noise, temperature=self.temperature, epsilon=self.epsilon
        )
        return Trajectories.of_one_source(leaves, log_q)


class CollaborativeSampler(Sampler):
    """Draws items in proportion to `softmax(score / temperature)` of a teacher, with replacement.

    Reads the column `history`.

    Args:
        teacher: a `gflowtrl.teachers.Teacher`, or any callable `histories -> (B, items)` in the catalog's order.
        temperature: > 0. A high value draws from all items, a low value from the best items of the teacher.
    """

    source_names = ("collaborative",)

    def __init__(self, teacher: Teacher | Callable[[Sequence[Sequence[Item]]], Any], temperature: float = 1.0):
        self.distribution = CollaborativeReward(teacher, temperature)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: Mapping[str, Any]) -> Self:
        return super().from_spec({"temperature": context["teacher_temperature"], **spec}, context)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        with torch.no_grad():
            items = self.distribution.bind(policy.catalog).score_items(step)
            leaves = policy.catalog.fold_items(items.to(step.device))
            if reward is not None and reward.excluded_leaves is not None:
                leaves = leaves.masked_fill(as_mask(reward.excluded_leaves, leaves.shape[1]), 0.0)
        return Trajectories.of_one_source(*draw_leaves(leaves, noise.uniform("collaborative", num_generations)))


class UniformSampler(Sampler):
    """Draws leaves uniformly, with replacement."""

    source_names = ("uniform",)

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        size = policy.catalog.tree.num_leaves
        uniforms = noise.uniform("uniform", num_generations).to(step.device)
        if reward is not None and reward.excluded_leaves is not None:
            return Trajectories.of_one_source(*draw_allowed(uniforms, reward.excluded_leaves, size, "UniformSampler"))
        leaves = (uniforms * size).long().clamp(max=size - 1)
        return Trajectories.of_one_source(leaves, torch.full(leaves.shape, -math.log(size), device=leaves.device))


class RewardSampler(Sampler):
    """Draws from the target distribution R / Z, which is the best source if the rewards of all leaves are known.

    Args:
        temperature: > 0; leaves are drawn in proportion to R ** (1 / temperature).
    """

    source_names = ("reward",)
    needs_all_rewards = True

    def __init__(self, temperature: float = 1.0):
        check_number("The temperature of RewardSampler", temperature, POSITIVE)
        self.temperature = temperature

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        if reward is None:
            raise ValueError("RewardSampler draws in proportion to R, but the reward is None; pass reward_funcs.")
        return Trajectories.of_one_source(*reward.sample(num_generations, noise, self.temperature))


class FunctionSampler(Sampler):
    """Calls `function(step, policy, reward, num_generations, noise)`; it returns leaves `(B, K)` or `Trajectories`.

    Raises:
        TypeError: the function does not take these five arguments.
    """

    def __init__(self, function: Callable[..., Tensor | Trajectories]):
        self.function = function
        self.source_names = (getattr(function, "__name__", type(function).__name__),)
        try:
            inspect.signature(function).bind("step", "policy", "reward", "num_generations", "noise")
        except ValueError:  # functions that are written in C may have no signature
            return
        except TypeError as error:
            raise TypeError(
                f"The sampler {self.source_names[0]!r} cannot be called ({error}); it must be a Sampler or "
                f"function(step, policy, reward, num_generations, noise)."
            ) from None

    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        drawn = self.function(step, policy, reward, num_generations, noise)
        if isinstance(drawn, Trajectories):
            return drawn
        if not isinstance(drawn, Tensor):
            raise TypeError(
                f"The sampler {self.source_names[0]!r} returned {type(drawn).__name__}; it must return a tensor "
                f"of leaves (B, K) or Trajectories."
            )
        return Trajectories.of_one_source(drawn)
