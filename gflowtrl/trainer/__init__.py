"""Trainers: `GFlowNetTrainer`, its configuration, and what trainers share."""

from .evaluation import RankingEvaluationMixin, compare_with_rewards, rank_rows
from .gflownet_config import GFlowNetConfig
from .gflownet_trainer import GFlowNetTrainer


__all__ = ["GFlowNetConfig", "GFlowNetTrainer", "RankingEvaluationMixin", "compare_with_rewards", "rank_rows"]
