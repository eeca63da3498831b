"""A language model read as a policy on the prefix tree: score, sample, beam search, exact leaf distribution."""

from .causal import CausalTreePolicy
from .heads import attach_flow_heads, has_flow_heads
from .noise import Noise, StatelessNoise
from .scores import StepScores


__all__ = ["CausalTreePolicy", "Noise", "StatelessNoise", "StepScores", "attach_flow_heads", "has_flow_heads"]
