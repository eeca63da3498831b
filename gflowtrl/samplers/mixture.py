"""Several sources in one group, and samplers by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .base import Sampler, TrajectoryBatch
from .basic import CollaborativeSampler, GroundTruthSampler, OnPolicySampler, RewardSampler, UniformSampler


class MixtureSampler(Sampler):
    """Divides the K trajectories of every prompt among several samplers.

    The division is fixed, not drawn: shares by largest remainder (ties to the earlier source), slots in the given
    order. `{"ground_truth": 1, "collaborative": 3, "on_policy": 4}` with K = 8 gives exactly 1, 3 and 4. Each source
    draws from a random stream of its own, so two samplers of one kind do not repeat each other. A mixture may hold
    mixtures; their sources are called "outer/inner".

    Args:
        sources: `{name: weight}` for samplers known by name that need nothing, or `{name: (sampler, weight)}`.
            `build_sampler` makes one from names that need a teacher.
    """

    def __init__(self, sources: Mapping[str, float | tuple[Sampler, float]]):
        pairs = {
            name: entry if isinstance(entry, tuple) else (build_sampler(name), entry)
            for name, entry in sources.items()
        }
        self.samplers = {name: sampler for name, (sampler, _) in pairs.items()}
        self.weights = [float(weight) for _, weight in pairs.values()]
        if not any(self.weights) or not all(math.isfinite(w) and w >= 0 for w in self.weights):
            raise ValueError(f"The weights of a mixture must be >= 0, finite and not all zero, got {self.weights}.")
        self.source_names = tuple(
            name if len(sampler.source_names) == 1 else f"{name}/{inner}"
            for name, sampler in self.samplers.items()
            for inner in sampler.source_names
        )

    def allocate(self, num_generations: int) -> list[int]:
        """How many of K trajectories each source gets."""
        weights = [Fraction(weight) for weight in self.weights]  # exact, so that ties are ties
        shares = [num_generations * weight / sum(weights) for weight in weights]
        counts = [math.floor(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for i in by_remainder[: num_generations - sum(counts)]:
            counts[i] += 1
        return counts

    def sample(self, batch: Mapping[str, Any], policy: Any, num_generations: int, noise: Any) -> TrajectoryBatch:
        drawn, first_source = [], 0
        for (name, sampler), count in zip(self.samplers.items(), self.allocate(num_generations), strict=True):
            if count:
                part = sampler.sample(batch, policy, count, _OwnStream(noise, name))
                drawn.append(TrajectoryBatch(part.leaves, part.source + first_source, part.log_q))
            first_source += len(sampler.source_names)
        known = all(part.log_q is not None for part in drawn)
        return TrajectoryBatch(
            torch.cat([part.leaves for part in drawn], 1),
            torch.cat([part.source for part in drawn], 1),
            torch.cat([part.log_q for part in drawn], 1) if known else None,
        )


class _OwnStream:
    """Noise whose purposes carry the source's name."""

    def __init__(self, noise: Any, name: str):
        self._noise, self._name = noise, name

    def uniform(self, purpose: str, num: int, depth: int = 0) -> Tensor:
        return self._noise.uniform(f"{self._name}/{purpose}", num, depth)

    def select(self, rows: slice | Tensor) -> _OwnStream:
        return _OwnStream(self._noise.select(rows), self._name)


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
        return TrajectoryBatch(drawn, torch.zeros_like(drawn))


def build_sampler(
    spec: str | Mapping | Sampler | type[Sampler] | Callable,
    teacher: Any = None,
    temperature: float = 1.0,
    epsilon: float = 0.0,
    teacher_temperature: float = 1.0,
) -> Sampler:
    """A sampler from what a recipe says.

    Args:
        spec: a name ("ground_truth", "on_policy", "collaborative", "uniform", "reward"); a mixture `{name: weight}` or
            `{any name: [spec, weight]}`; a sampler, its class, or a function (see `FunctionSampler`).
        teacher, teacher_temperature: of "collaborative".
        temperature, epsilon: of "on_policy".
    """
    options = (teacher, temperature, epsilon, teacher_temperature)
    if isinstance(spec, Sampler):
        return spec
    if isinstance(spec, Mapping):
        pairs = {name: entry if isinstance(entry, list | tuple) else (name, entry) for name, entry in spec.items()}
        return MixtureSampler({name: (build_sampler(inner, *options), w) for name, (inner, w) in pairs.items()})
    if isinstance(spec, type) and issubclass(spec, Sampler):
        return spec()
    if callable(spec):
        return FunctionSampler(spec)
    if spec == "collaborative":
        if teacher is None:
            raise ValueError(
                "The sampler 'collaborative' needs a teacher: give one, or a CollaborativeSampler(teacher)."
            )
        return CollaborativeSampler(teacher, teacher_temperature)
    if spec == "on_policy":
        return OnPolicySampler(temperature, epsilon)
    simple = {"ground_truth": GroundTruthSampler, "uniform": UniformSampler, "reward": RewardSampler}
    if spec in simple:
        return simple[spec]()
    raise ValueError(f"Unknown sampler {spec!r}; known are {sorted([*simple, 'collaborative', 'on_policy'])}.")
