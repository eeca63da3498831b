"""Samplers draw the trajectories of a training step."""

from .basic import (
    CollaborativeSampler,
    FunctionSampler,
    GroundTruthSampler,
    OnPolicySampler,
    RewardSampler,
    UniformSampler,
)
from .beam import BeamSampler, StochasticBeamSampler
from .curriculum import CurriculumSampler, LowConfidenceSampler
from .mixture import (
    SAMPLERS,
    AdaptiveMixtureSampler,
    MixtureSampler,
    ScheduledMixtureSampler,
    build_sampler,
    uses_teacher,
)
from .observed import HistorySampler, InteractionLogSampler, UnobservedSampler
from .replay import ReplaySampler
from .sampler import Feedback, Sampler, Trajectories, validate_trajectories


__all__ = [
    "SAMPLERS",
    "AdaptiveMixtureSampler",
    "BeamSampler",
    "CollaborativeSampler",
    "CurriculumSampler",
    "Feedback",
    "FunctionSampler",
    "GroundTruthSampler",
    "HistorySampler",
    "InteractionLogSampler",
    "LowConfidenceSampler",
    "MixtureSampler",
    "OnPolicySampler",
    "ReplaySampler",
    "RewardSampler",
    "Sampler",
    "ScheduledMixtureSampler",
    "StochasticBeamSampler",
    "Trajectories",
    "UniformSampler",
    "UnobservedSampler",
    "build_sampler",
    "uses_teacher",
    "validate_trajectories",
]
