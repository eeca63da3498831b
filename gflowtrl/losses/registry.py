"""Registry of the losses by name, and what each loss needs from the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from .contrastive_balance import contrastive_balance
from .detailed_balance import detailed_balance, subtrajectory_balance
from .exact_flow import exact_flow
from .prefix import prefix_pairwise, prefix_pointwise
from .prefix_weights import PrefixWeights
from .sft import sft
from .trajectory_balance import trajectory_balance
from .vargrad import vargrad


@dataclass(frozen=True)
class LossInputs:
    """The tensors of a step. A loss receives those that its parameters name. `K` trajectories for each of `B` prompts,
    `L` tokens per id, `C` children per node.

    Attributes:
        log_probs: `(B, K, L)` log pi of each token taken, 0 after a shorter id's end.
        lengths: `(B, K)` number of tokens of each id.
        child_log_probs: `(B, K, L, C)` log pi of every child of each visited state, -inf on padding.
        leaves: `(B, K)` leaf of each trajectory.
        log_rewards: `(B, K)` log R.
        rewards: `(B, K)` the weighted sum of the rewards, before the transform to log R.
        advantages: `(B, K)` rewards, normalized within the group.
        child_target_log_probs: `(B, K, L, C)` log pi* of the children, available if the flow of every node is known.
        log_z: `(B,)` learned log Z(x).
        log_flows: `(B, K, L)` learned log F of the states s_0 .. s_{L-1}.
        ref_log_probs: `(B, K, L)` log-probabilities of the same tokens under the reference model.
        prefix_nodes: `(B, K, L)` node reached by each token, -1 after the end of an id.
        nodes_per_depth: `(L,)` number of the catalog's prefixes at each depth.
    """

    log_probs: Tensor
    lengths: Tensor
    child_log_probs: Tensor | None = None
    leaves: Tensor | None = None
    log_rewards: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    child_target_log_probs: Tensor | None = None
    log_z: Tensor | None = None
    log_flows: Tensor | None = None
    ref_log_probs: Tensor | None = None
    prefix_nodes: Tensor | None = None
    nodes_per_depth: Tensor | None = None

    @classmethod
    def zeros(cls, num_generations: int) -> LossInputs:
        """Return inputs to check options with: tensors of the right shapes for one prompt and ids of one token."""
        shape = (1, num_generations, 1, 1)
        dimensions = {"log_z": 1, "nodes_per_depth": 1, "child_log_probs": 4, "child_target_log_probs": 4}
        dimensions |= dict.fromkeys(("lengths", "leaves", "log_rewards", "rewards", "advantages"), 2)
        tensors = {entry.name: torch.zeros(shape[: dimensions.get(entry.name, 3)]) for entry in fields(cls)}
        return cls(**tensors | {"lengths": torch.ones(shape[:2], dtype=torch.long)})


_TENSORS = tuple(entry.name for entry in fields(LossInputs))


@dataclass(frozen=True)
class LossSpec:
    """A loss function and what the trainer must provide for it. Most needs follow from the function's parameters.

    Args:
        function: per-trajectory loss `(B, K)`. Parameters without a default are tensors of `LossInputs`, and so is one
            with the name of such a tensor and the default None, which the function can do without. Other parameters
            with a default are options, set by `loss_kwargs`.
        min_generations: minimum number of trajectories per prompt.
        uses_target: the loss is computed on the observed target's id instead of the sampled trajectories.
        uses_negatives: the loss scores the target (index 0) together with the sampled trajectories (indices 1..K).
        per_prompt: the loss returns one value per prompt, `(B, 1)`, for all drawn trajectories, so that
            `trajectory_weighting` does not apply to it.
        any_label_space: the log-probabilities (and the reference's) may be over the whole vocabulary instead of the
            tree.
        sets_temperature: the option `temperature` belongs to the policy. The trainer divides the logits by it in
            training, in evaluation and in saved models, and the loss itself gets 1.
        prefix_weights: for a loss that returns one value per prefix of the target, `(B, L)`: the class that weights
            them by depth.

    Raises:
        ValueError: a parameter without a default is not a tensor of `LossInputs`.
    """

    function: Callable[..., Tensor]
    min_generations: int = 1
    uses_target: bool = False
    uses_negatives: bool = False
    per_prompt: bool = False
    any_label_space: bool = False
    sets_temperature: bool = False
    prefix_weights: type[PrefixWeights] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.inputs if name not in _TENSORS]
        if unknown:
            raise ValueError(
                f"The loss {_name(self.function)!r} has the parameter {unknown[0]!r} without a default, which is not "
                f"a tensor of a step; those are {', '.join(_TENSORS)}. If it is an option, give it a default."
            )

    def __call__(self, inputs: LossInputs, **options: Any) -> Tensor:
        """Call the function with its tensors, selected by name, and its options.

        Raises:
            ValueError: a tensor that the loss needs is None.
        """
        tensors = {name: getattr(inputs, name) for name in self.inputs}
        needed = [p.name for p in signature(self.function).parameters.values() if p.default is Parameter.empty]
        missing = [name for name in needed if tensors[name] is None]
        if missing:
            raise ValueError(f"The loss {_name(self.function)!r} needs {', '.join(missing)}, which was not given.")
        return self.function(**tensors, **_select(self.fit_options(options), self.function))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that the function takes."""
        return tuple(p for p in signature(self.function).parameters if p not in _defaults(self.function))

    @property
    def options(self) -> dict[str, Any]:
        """The options that `loss_kwargs` may set, including those of the prefix weights, with their defaults."""
        weights = {} if self.prefix_weights is None else _defaults(self.prefix_weights)
        return weights | _defaults(self.function)

    def make_prefix_weights(
        self, depth: int, reduce_sum: Callable[[Tensor], Tensor], options: Mapping[str, Any]
    ) -> PrefixWeights | None:
        """Create the prefix weights with their part of the options. Return None for losses without prefix weights."""
        if self.prefix_weights is None:
            return None
        return self.prefix_weights(depth, reduce_sum, **_select(options, self.prefix_weights))

    def fit_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Convert options to the types of their defaults: text to numbers, and numbers to text.

        JSON and YAML infer the type of a value: `{"variant": "2025"}` can arrive as a number, `eta: 5e-4` as text.

        Raises:
            ValueError: the loss does not have an option; the message lists the options that exist.
            TypeError: an option is a boolean and its default is not, or the other way around.
        """
        fitted = {}
        for name, value in options.items():
            if name not in self.options:
                raise ValueError(f"There is no option {name!r}; known options: {', '.join(self.options) or 'none'}.")
            default = self.options[name]
            if default is not None and isinstance(default, bool) != isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must have the type of its default, {default!r}.")
            if isinstance(default, str):
                value = str(value)
            elif isinstance(value, str):
                with suppress(ValueError):
                    value = (float if default is None else type(default))(value)
            fitted[name] = value
        return fitted

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Convert the options (`fit_options`) and check them. The losses of gflowtrl also check the values.

        Raises:
            ValueError, TypeError: an option does not exist, or the loss does not accept its value.
        """
        fitted = self.fit_options(options)
        self.make_prefix_weights(1, torch.clone, fitted)
        if self.function.__module__.startswith("gflowtrl.losses"):  # a user's loss may need other ids than these
            count = 1 if self.uses_target and not self.uses_negatives else max(self.min_generations, 2)
            self(LossInputs.zeros(count), **fitted)
        return fitted

    def at_policy(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Remove the temperature, which the policy has already applied (`sets_temperature`)."""
        return {n: v for n, v in options.items() if not (self.sets_temperature and n == "temperature")}

    @property
    def needs_flow_heads(self) -> bool:
        """Whether the loss needs a flow head in the model (learned log Z(x), or learned log F at every state)."""
        return not {"log_z", "log_flows"}.isdisjoint(self.inputs)

    @property
    def needs_all_rewards(self) -> bool:
        """Whether the loss needs the reward of every leaf."""
        return "child_target_log_probs" in self.inputs

    @property
    def needs_log_rewards(self) -> bool:
        """Whether the loss needs log R (it is a balance loss), at least of the drawn leaves."""
        return self.needs_all_rewards or "log_rewards" in self.inputs

    @property
    def needs_rewards(self) -> bool:
        """Whether the loss needs rewards in any form."""
        return self.needs_log_rewards or not {"rewards", "advantages"}.isdisjoint(self.inputs)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference model."""
        return "ref_log_probs" in self.inputs


LOSSES: dict[str, LossSpec] = {}


def register_loss(name: str, spec: LossSpec | Callable[..., Tensor]) -> None:
    """Register a loss under a name for `loss_type`.

    Args:
        name: the name of the loss in `loss_type` and `loss_kwargs`.
        spec: the loss and its needs. A plain function of the tensors of `LossInputs` means `LossSpec(function)`.

    Raises:
        ValueError: the name belongs to another function, or the function needs a tensor that does not exist.

    Example:
        ```python
        def log_cosh(log_probs, log_rewards, scale=1.0):
            balance = log_rewards - log_probs.sum(-1)
            return (scale * (balance - balance.mean(1, keepdim=True))).cosh().log()

        register_loss("log_cosh", LossSpec(log_cosh, min_generations=2))
        ```
    """
    spec = spec if isinstance(spec, LossSpec) else LossSpec(spec)
    known = LOSSES.get(name)
    if known is not None and _identity(known.function) != _identity(spec.function):  # a notebook may define it again
        raise ValueError(f"There is already a loss {name!r}, {_identity(known.function)[1]}; choose another name.")
    LOSSES[name] = spec


def get_loss(name: str) -> LossSpec:
    """Return the loss registered under a name.

    Raises:
        ValueError: no loss has this name; the message lists the known losses.
    """
    if name not in LOSSES:
        raise ValueError(
            f"There is no loss {name!r}; the known losses are {', '.join(sorted(LOSSES))}. Register a custom loss "
            f"with gflowtrl.losses.register_loss."
        )
    return LOSSES[name]


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the options of a function with their defaults."""
    parameters = [p for p in signature(function).parameters.values() if p.default is not Parameter.empty]
    return {p.name: p.default for p in parameters if not (p.default is None and p.name in _TENSORS)}


def _select(options: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Return the options that are parameters of a function."""
    return {name: options[name] for name in options.keys() & _defaults(function)}


def _name(function: Callable[..., Tensor]) -> str:
    return getattr(function, "__name__", repr(function))


def _identity(function: Callable[..., Tensor]) -> tuple[str, object]:
    # A callable without a name, such as a functools.partial, is identical only to itself.
    return function.__module__, getattr(function, "__qualname__", function)


register_loss("trajectory_balance", trajectory_balance)
register_loss("vargrad", LossSpec(vargrad, min_generations=2))
register_loss("contrastive_balance", LossSpec(contrastive_balance, min_generations=2))
register_loss("detailed_balance", detailed_balance)
register_loss("subtrajectory_balance", subtrajectory_balance)
register_loss("exact_flow", exact_flow)
register_loss("sft", LossSpec(sft, uses_target=True, any_label_space=True))
register_loss(
    "prefix_pointwise",
    LossSpec(prefix_pointwise, uses_target=True, any_label_space=True, prefix_weights=PrefixWeights),
)
register_loss(
    "prefix_pairwise",
    LossSpec(
        prefix_pairwise, min_generations=2, uses_target=True, uses_negatives=True, any_label_space=True,
        prefix_weights=PrefixWeights,
    ),
)  # fmt: skip
