"""The losses by name, and what each needs. A new loss is one file and one line in `LOSSES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature

from torch import Tensor

from .baselines import grpo, msl, sdpo
from .contrastive_balance import contrastive_balance
from .detailed_balance import detailed_balance, subtrajectory_balance
from .exact_flow import exact_flow
from .prefix import prefix_pairwise, prefix_pointwise
from .sft import sft
from .trajectory_balance import trajectory_balance
from .vargrad import vargrad


@dataclass(frozen=True)
class LossSpec:
    """A loss function and what the trainer must provide for it; the needs follow from the function's parameters.

    Args:
        function: per-trajectory loss `(B, K)`. Parameters without a default are tensors, those with one are options.
        min_generations: least number of trajectories a prompt.
        on_target: computed on the observed target's id instead of on the sampled trajectories.
        against_group: of those on the target, computed on the target and, behind it, the sampled trajectories.
        any_label_space: its log-probabilities may be over the whole vocabulary instead of the tree.
        per_prefix: `(B, L)` losses of the target's prefixes instead, which the trainer weighs by depth.
    """

    function: Callable[..., Tensor]
    min_generations: int = 1
    on_target: bool = False
    against_group: bool = False
    per_prefix: bool = False
    any_label_space: bool = False

    def __call__(self, tensors: Mapping[str, Tensor], **options: object) -> Tensor:
        """Pick this loss's tensors by name and call it; options that it does not have are left out.

        Raises:
            ValueError: a tensor that the loss needs is missing or None.
        """
        missing = [name for name in self.inputs if tensors.get(name) is None]
        if missing:
            raise ValueError(f"The loss {self.function.__name__!r} needs {', '.join(missing)}, which was not given.")
        known = {name: value for name, value in options.items() if name in self.options}
        return self.function(**{name: tensors[name] for name in self.inputs}, **known)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors it takes."""
        return tuple(p.name for p in signature(self.function).parameters.values() if p.default is Parameter.empty)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options it takes."""
        return tuple(name for name in signature(self.function).parameters if name not in self.inputs)

    @property
    def log_z(self) -> bool:
        """Whether it needs a learned log Z(x)."""
        return "log_z" in self.inputs

    @property
    def log_flows(self) -> bool:
        """Whether it needs a learned log F at every state."""
        return "log_flows" in self.inputs

    @property
    def heads(self) -> bool:
        """Whether the model must carry a flow head, which gives both."""
        return self.log_z or self.log_flows

    @property
    def all_leaf_rewards(self) -> bool:
        """Whether the reward of every leaf must be computable."""
        return "child_target_log_probs" in self.inputs

    @property
    def balances(self) -> bool:
        """Whether it balances towards log R."""
        return self.all_leaf_rewards or "log_rewards" in self.inputs

    @property
    def rewards(self) -> bool:
        """Whether it uses rewards at all."""
        return self.balances or "advantages" in self.inputs

    @property
    def reference(self) -> bool:
        """Whether it compares the policy with a reference model."""
        return "ref_log_probs" in self.inputs


LOSSES: dict[str, LossSpec] = {
    "trajectory_balance": LossSpec(trajectory_balance),
    "vargrad": LossSpec(vargrad, min_generations=2),
    "contrastive_balance": LossSpec(contrastive_balance, min_generations=2),
    "detailed_balance": LossSpec(detailed_balance),
    "subtrajectory_balance": LossSpec(subtrajectory_balance),
    "exact_flow": LossSpec(exact_flow),
    "sft": LossSpec(sft, on_target=True, any_label_space=True),
    "prefix_pointwise": LossSpec(prefix_pointwise, on_target=True, per_prefix=True, any_label_space=True),
    "prefix_pairwise": LossSpec(
        prefix_pairwise, min_generations=2, on_target=True, against_group=True, per_prefix=True, any_label_space=True
    ),
    "msl": LossSpec(msl, on_target=True),
    "sdpo": LossSpec(sdpo, min_generations=2, on_target=True, against_group=True),
    "grpo": LossSpec(grpo, min_generations=2),
}


def get_loss(name: str) -> LossSpec:
    """The loss of that name.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    if name not in LOSSES:
        raise ValueError(f"There is no loss {name!r}; the known losses are {', '.join(sorted(LOSSES))}.")
    return LOSSES[name]
