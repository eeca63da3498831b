"""Objectives as pure functions on tensors: one loss a trajectory, `(B, K)`, unreduced."""

from .baselines import grpo, msl, sdpo
from .contrastive_balance import contrastive_balance
from .detailed_balance import detailed_balance, subtrajectory_balance
from .exact_flow import exact_flow, flow_targets, node_flows, normalised_flows
from .prefix import prefix_pairwise, prefix_pointwise
from .registry import LOSSES, LossSpec, get_loss
from .sft import sft
from .trajectory_balance import trajectory_balance
from .vargrad import vargrad


__all__ = [
    "LOSSES",
    "LossSpec",
    "contrastive_balance",
    "detailed_balance",
    "exact_flow",
    "flow_targets",
    "get_loss",
    "grpo",
    "msl",
    "node_flows",
    "normalised_flows",
    "prefix_pairwise",
    "prefix_pointwise",
    "sdpo",
    "sft",
    "subtrajectory_balance",
    "trajectory_balance",
    "vargrad",
]
