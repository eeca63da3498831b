"""Objectives as pure functions on tensors: one loss a trajectory, `(B, K)`, unreduced."""

from .exact_flow import exact_flow, flow_targets
from .registry import LOSSES, LossSpec, get_loss
from .sft import sft
from .trajectory_balance import trajectory_balance
from .vargrad import vargrad


__all__ = ["LOSSES", "LossSpec", "exact_flow", "flow_targets", "get_loss", "sft", "trajectory_balance", "vargrad"]
