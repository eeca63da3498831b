"""Samplers: where the trajectories of a training step come from."""

from .base import Sampler, TrajectoryBatch, draw_leaves, validate_trajectories
from .basic import CollaborativeSampler, GroundTruthSampler, OnPolicySampler, RewardSampler, UniformSampler
from .mixture import FunctionSampler, MixtureSampler, build_sampler


__all__ = [
    "CollaborativeSampler",
    "FunctionSampler",
    "GroundTruthSampler",
    "MixtureSampler",
    "OnPolicySampler",
    "RewardSampler",
    "Sampler",
    "TrajectoryBatch",
    "UniformSampler",
    "build_sampler",
    "draw_leaves",
    "validate_trajectories",
]
