"""Training objectives as pure functions on tensors: one unreduced loss per trajectory, `(B, K)`."""

from .baselines import bear, flowrl, gbpo, grpo, ipa, msl, sdpo, sibling_grpo
from .contrastive_balance import contrastive_balance
from .detailed_balance import detailed_balance, subtrajectory_balance
from .exact_flow import exact_flow, normalized_flows
from .policy_gradient import group_advantages
from .prefix import prefix_pairwise, prefix_pointwise
from .prefix_weights import PrefixWeights
from .registry import LOSSES, LossInputs, LossSpec, get_loss, register_loss
from .sft import sft
from .trajectory_balance import trajectory_balance
from .vargrad import vargrad


__all__ = [
    "LOSSES",
    "LossInputs",
    "LossSpec",
    "PrefixWeights",
    "bear",
    "contrastive_balance",
    "detailed_balance",
    "exact_flow",
    "flowrl",
    "gbpo",
    "get_loss",
    "group_advantages",
    "grpo",
    "ipa",
    "msl",
    "normalized_flows",
    "prefix_pairwise",
    "prefix_pointwise",
    "register_loss",
    "sdpo",
    "sft",
    "sibling_grpo",
    "subtrajectory_balance",
    "trajectory_balance",
    "vargrad",
]
