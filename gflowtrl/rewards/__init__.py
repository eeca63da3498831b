"""Rewards score recommended items; `CompositeReward` combines several of them into one `log R`."""

from .collaborative import CollaborativeReward
from .composite import CompositeReward
from .ground_truth import GroundTruthReward
from .interaction import InteractionReward
from .likelihood import LikelihoodReward
from .rank_penalty import RankPenaltyReward
from .reward import AnyReward, Reward, ScoresItems, ScoresLeaves
from .reward_model import RewardModel
from .step_reward import DenseReward, PosteriorReward, RewardResult, SampledReward, StepReward, TopKReward, draw_leaves
from .title_likelihood import TitleLikelihoodReward
from .token_similarity import TokenSimilarityReward
from .uniform import UniformReward
from .weights import LearnedWeights, fit_reward_weights, one_step_back


__all__ = [
    "AnyReward",
    "CollaborativeReward",
    "CompositeReward",
    "DenseReward",
    "GroundTruthReward",
    "InteractionReward",
    "LearnedWeights",
    "LikelihoodReward",
    "PosteriorReward",
    "RankPenaltyReward",
    "Reward",
    "RewardModel",
    "RewardResult",
    "SampledReward",
    "ScoresItems",
    "ScoresLeaves",
    "StepReward",
    "TitleLikelihoodReward",
    "TokenSimilarityReward",
    "TopKReward",
    "UniformReward",
    "draw_leaves",
    "fit_reward_weights",
    "one_step_back",
]
