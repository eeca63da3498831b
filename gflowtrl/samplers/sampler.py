"""Base class of samplers, their results and checks of these."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gflowtrl.checks import short_repr
from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import StepReward


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of a batch. In a prefix tree, each leaf has one path, so a leaf identifies a trajectory.

    Attributes:
        leaves: `(B, K)` long.
        source: `(B, K)` long, index into the sampler's `source_names`: the source that drew the trajectory.
        log_q: `(B, K)` log-probability under the distribution that drew the trajectory (in a mixture, the distribution
            of its source), or None if it is unknown.
    """

    leaves: Tensor
    source: Tensor
    log_q: Tensor | None = None

    @classmethod
    def of_one_source(cls, leaves: Tensor, log_q: Tensor | None = None) -> Trajectories:
        """Make the trajectories of a sampler with a single source."""
        return cls(leaves, torch.zeros_like(leaves), log_q)

    def columns(self, index: Tensor) -> Trajectories:
        """Select the trajectories `index (n,)` of every row."""
        log_q = None if self.log_q is None else self.log_q[:, index]
        return Trajectories(self.leaves[:, index], self.source[:, index], log_q)


@dataclass(frozen=True)
class Feedback:
    """Rewards and residuals of a step's trajectories.

    Attributes:
        log_rewards: `(B, K)` log R, -inf for items that `exclude_history` excludes.
        residual: `(B, K)` |log Z + log pi - log R|, with the best available log Z.
        log_pi: `(B, K)` log pi(leaf | x) under the policy in training.
    """

    log_rewards: Tensor
    residual: Tensor
    log_pi: Tensor

    def columns(self, index: Tensor) -> Feedback:
        """Select the trajectories `index (n,)` of every row."""
        return Feedback(self.log_rewards[:, index], self.residual[:, index], self.log_pi[:, index])


class Sampler(ABC):
    """Draws K trajectories for each prompt.

    GFlowNet objectives are correct for any sampler that reaches all leaves. The choice of the sampler affects how fast
    and where the policy learns. All randomness comes from `noise`, a function of the row: a row gets the same leaves
    in any batch.
    """

    source_names: tuple[str, ...] = ("unnamed",)
    needs_all_rewards: bool = False  # whether it draws by the rewards of all leaves
    observes_group: bool = False  # whether a mixture passes the whole group to `observe`, or only its own trajectories

    @abstractmethod
    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        """Draw trajectories.

        Args:
            step: prompts and dataset columns of B rows, and the progress of the training.
            policy: the policy in training, with its `catalog`.
            reward: rewards of this step's prompts; None if the training has no rewards.
            num_generations: K, the number of trajectories per prompt.
            noise: `StatelessNoise(seed).at(step, row_ids)`.
        """

    def observe(  # noqa: B027 - not abstract: most samplers have no state
        self, step: Step, trajectories: Trajectories, feedback: Feedback
    ) -> None:
        """Update the sampler's state after each loss. The default does nothing.

        Args:
            step: the argument of `sample`.
            trajectories: the result of `sample`. In a mixture, `source` is relative to this sampler's first source, so
                its own trajectories are those with `0 <= source < len(source_names)`.
            feedback: log R, residuals and log pi of the trajectories, `(B, K)` each, without gradient.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed training needs, as a flat dict of tensors. Most samplers have no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the result of `state_dict`. Raises a ValueError if the state belongs to another sampler."""
        check_state(self, state, ())

    def metrics(self) -> dict[str, float]:
        """Return numbers for the training log, such as the size of a buffer."""
        return {}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: Mapping[str, Any]) -> Self:
        """Make the sampler that a recipe describes.

        Args:
            spec: the options of the recipe, without the type.
            context: `teacher`, `build` (makes a sampler from another spec), and the trainer's `temperature`, `epsilon`
                and `teacher_temperature`. The first two are passed to constructors with parameters of these names.
        """
        parameters = inspect.signature(cls).parameters
        return cls(**{name: context[name] for name in ("teacher", "build") if name in parameters}, **spec)


def check_state(sampler: Sampler, state: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    """Raise a ValueError unless a saved state has exactly the expected entries."""
    if sorted(state) != sorted(expected):
        raise ValueError(
            f"The saved state of {type(sampler).__name__} has the entries {sorted(state)}; it must have "
            f"{sorted(expected)}. Resume with the sampler of the checkpoint, or start a new training."
        )


def fill_missing(leaves: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Replace missing leaves by repeating the present leaves of the row in order.

    Args:
        leaves: `(B, K)`. Missing leaves are -1 at the end of a row. Each row has at least one leaf.
        values: more tensors `(B, K)` that belong to the leaves.

    Returns:
        The leaves and the values without gaps.
    """
    count = (leaves >= 0).sum(1, keepdim=True)
    position = torch.arange(leaves.shape[1], device=leaves.device) % count
    return tuple(tensor.gather(1, position) for tensor in (leaves, *values))


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over all processes of the training, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def validate_trajectories(
    trajectories: Trajectories,
    batch_size: int,
    num_generations: int,
    num_leaves: int,
    num_sources: int | None = None,
) -> None:
    """Check the result of a sampler with `num_sources` source names, or any number.

    Raises:
        TypeError: the result is not `Trajectories` of tensors.
        ValueError: a shape or dtype is wrong, or a number is not a leaf or a source; the error names the position.
    """
    check_form(trajectories, batch_size, num_generations)
    leaves, source = trajectories.leaves, trajectories.source
    outside = (leaves < 0) | (leaves >= num_leaves)
    unknown = torch.zeros_like(outside) if num_sources is None else (source < 0) | (source >= num_sources)
    if not (outside | unknown).any():
        return
    if num_sources is not None and unknown.any():
        row, column = unknown.nonzero()[0].tolist()
        raise ValueError(
            f"The sampler returned source {source[row, column].item()} for trajectory {column} of row {row}; sources "
            f"are positions in its source_names, 0 to {num_sources - 1}."
        )
    row, column = outside.nonzero()[0].tolist()
    raise ValueError(
        f"The sampler returned {leaves[row, column].item()} as trajectory {column} of row {row}, which is not a "
        f"leaf: leaves are the numbers 0 to {num_leaves - 1}. Return leaves, not items, tokens or nodes "
        f"(catalog.leaf_of(items) returns the leaves of items)."
    )


def check_form(trajectories: Trajectories, batch_size: int, num_generations: int) -> None:
    """Check types, shapes and dtypes of the result of a sampler, which need not wait for the device."""
    if not isinstance(trajectories, Trajectories):
        raise TypeError(f"The sampler returned {type(trajectories).__name__}; it must return Trajectories.")
    shape = (batch_size, num_generations)
    for name in ("leaves", "source", "log_q"):
        values = getattr(trajectories, name)
        if name == "log_q" and values is None:
            continue
        if not isinstance(values, Tensor) or values.is_meta or values.is_sparse:
            what = short_repr(values) if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"The sampler returned {name} as {what}; it must be a tensor.")
        if values.shape != shape:
            raise ValueError(
                f"The sampler returned {name} of shape {tuple(values.shape)}; it must be {shape}: {batch_size} "
                f"prompts with num_generations={num_generations} trajectories each."
            )
        if name != "log_q" and values.dtype != torch.long:
            raise ValueError(f"The sampler returned {name} of {values.dtype}; they must be integers (torch.long).")
        if name == "log_q" and not values.is_floating_point():
            raise ValueError(f"The sampler returned log_q of {values.dtype}; they must be floating-point numbers.")
