"""Trainers: `GFlowNetTrainer`, `APAOTrainer`, their configurations and their common base."""

from .apao import APAOConfig, APAOTrainer
from .evaluation import RankingEvaluationMixin, compare_with_rewards, rank_both, rank_rows
from .exposed import candidate_log_probs
from .gflownet_config import GFlowNetConfig
from .gflownet_trainer import GFlowNetTrainer
from .tree_policy_config import TreePolicyConfig
from .tree_policy_trainer import TreePolicyTrainer


__all__ = [
    "APAOConfig",
    "APAOTrainer",
    "GFlowNetConfig",
    "GFlowNetTrainer",
    "RankingEvaluationMixin",
    "TreePolicyConfig",
    "TreePolicyTrainer",
    "candidate_log_probs",
    "compare_with_rewards",
    "rank_both",
    "rank_rows",
]
