"""Rival objectives to compare the balance losses with, registered like a user's loss (docs/rivals.md)."""

from __future__ import annotations

from .bear import bear
from .flowrl import flowrl
from .msl import msl
from .policy_gradient import gbpo, grpo
from .preference import ipa, sdpo
from .registry import LossSpec, register_loss
from .sibling_grpo import sibling_grpo


register_loss("msl", LossSpec(msl, uses_target=True, sets_temperature=True))
register_loss("bear", LossSpec(bear, uses_target=True))
register_loss("sdpo", LossSpec(sdpo, min_generations=2, uses_target=True, uses_negatives=True, any_label_space=True))
register_loss("ipa", LossSpec(ipa, min_generations=2, per_prompt=True))
register_loss("grpo", LossSpec(grpo, min_generations=2))
register_loss("sibling_grpo", LossSpec(sibling_grpo, min_generations=2))
register_loss("gbpo", gbpo)
register_loss("flowrl", LossSpec(flowrl, min_generations=2))
