"""Rewards: what makes a recommendation good, and how several opinions become one `log R`."""

from .base import Reward
from .collaborative import CollaborativeReward
from .fusion import RewardFusion, RewardResult
from .ground_truth import GroundTruthReward
from .likelihood import LikelihoodReward


__all__ = [
    "CollaborativeReward",
    "GroundTruthReward",
    "LikelihoodReward",
    "Reward",
    "RewardFusion",
    "RewardResult",
]
