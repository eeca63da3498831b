"""Rewards: what makes a recommendation good, and how several opinions become one `log R`."""

from .base import Reward
from .collaborative import CollaborativeReward
from .fusion import RewardFusion, RewardResult
from .ground_truth import GroundTruthReward
from .interaction import InteractionReward
from .likelihood import LikelihoodReward
from .rank_penalty import RankPenaltyReward
from .title_likelihood import TitleLikelihoodReward
from .token_similarity import TokenSimilarityReward
from .top import TopRewards, rewards_by_rows, top_rewards
from .weights import LearnedWeights, fit_reward_weights, one_step_back


__all__ = [
    "CollaborativeReward",
    "GroundTruthReward",
    "InteractionReward",
    "LearnedWeights",
    "LikelihoodReward",
    "RankPenaltyReward",
    "Reward",
    "RewardFusion",
    "RewardResult",
    "TitleLikelihoodReward",
    "TokenSimilarityReward",
    "TopRewards",
    "fit_reward_weights",
    "one_step_back",
    "rewards_by_rows",
    "top_rewards",
]
