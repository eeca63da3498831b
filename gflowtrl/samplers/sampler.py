"""What a sampler is, what it returns, and how leaves are drawn without hidden state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gflowtrl.data import Step
from gflowtrl.policy import Noise, TreePolicy
from gflowtrl.rewards import StepReward


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of a batch. On a prefix tree a leaf has one path, so a leaf is a trajectory.

    Attributes:
        leaves: `(B, K)` long.
        source: `(B, K)` long, which of the sampler's `source_names` drew it.
        log_q: `(B, K)` log-probability under the distribution that drew it (in a mixture: under its source's), or None
            where that is not known.
    """

    leaves: Tensor
    source: Tensor
    log_q: Tensor | None = None

    @classmethod
    def of_one_source(cls, leaves: Tensor, log_q: Tensor | None = None) -> Trajectories:
        """The trajectories of a sampler with a single source."""
        return cls(leaves, torch.zeros_like(leaves), log_q)

    def columns(self, which: Tensor) -> Trajectories:
        """Some of the K trajectories, the same of every row: `which (n,)` are their numbers."""
        log_q = None if self.log_q is None else self.log_q[:, which]
        return Trajectories(self.leaves[:, which], self.source[:, which], log_q)


@dataclass(frozen=True)
class Feedback:
    """What became of a step's trajectories.

    Attributes:
        log_rewards: `(B, K)` log R.
        residual: `(B, K)` |log Z + log pi - log R|, with the best known log Z.
        log_pi: `(B, K)` log pi(leaf | x) under the policy in training.
    """

    log_rewards: Tensor
    residual: Tensor
    log_pi: Tensor

    def columns(self, which: Tensor) -> Feedback:
        """Of some of the K trajectories, the same of every row: `which (n,)` are their numbers."""
        return Feedback(self.log_rewards[:, which], self.residual[:, which], self.log_pi[:, which])


class Sampler(ABC):
    """Draws K trajectories for each prompt. Objectives of GFlowNets are right for any sampler that reaches all leaves;
    which one is used decides how fast they learn, and where.

    Randomness comes from `noise` alone, a function of the row: the same row draws the same leaves in whatever batch.
    """

    source_names: tuple[str, ...] = ("unnamed",)
    observes_group: bool = False  # whether a mixture tells it of the whole group, or of its own trajectories alone

    @abstractmethod
    def sample(
        self, step: Step, policy: TreePolicy, reward: StepReward | None, num_generations: int, noise: Noise
    ) -> Trajectories:
        """Draw.

        Args:
            step: prompts and dataset columns of B rows, and the progress of the training.
            policy: the policy in training, with its `catalog`.
            reward: of this step's prompts; None where nothing is rewarded.
            num_generations: K, all trajectories of a prompt.
            noise: `StatelessNoise(seed).at(step, row_ids)`.
        """

    def observe(  # noqa: B027 - not abstract: most samplers learn nothing
        self, step: Step, trajectories: Trajectories, feedback: Feedback
    ) -> None:
        """Learn from what became of the trajectories; called once after each loss. The default does nothing.

        Args:
            step: what `sample` got.
            trajectories: what `sample` returned. In a mixture `source` counts from this sampler's first source, so its
                own trajectories are those with `0 <= source < len(source_names)`.
            feedback: their log R, residuals and log pi, `(B, K)` each, without gradient.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed training needs to go on as if undisturbed: flat tensors; of most samplers none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises a ValueError where the state is another sampler's."""
        check_state(self, state, ())

    def metrics(self) -> dict[str, float]:
        """Numbers for the training log, such as the size of a buffer."""
        return {}


def check_state(sampler: Sampler, state: Mapping[str, Tensor], expected: Iterable[str]) -> None:
    """Raise a ValueError unless a state to load has exactly the expected entries."""
    if sorted(state) != sorted(expected):
        raise ValueError(
            f"The saved state of {type(sampler).__name__} has the entries {sorted(state)}, but {sorted(expected)} are "
            f"needed: the checkpoint was written with another sampler. Resume with that one, or start afresh."
        )


def fill_missing(leaves: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Fill the places of missing leaves by repeating those that are there, in turn.

    Args:
        leaves: `(B, K)`, -1 (only at the end of a row) for missing ones, at least one a row present.
        values: more tensors `(B, K)` that belong to the leaves.

    Returns:
        All of them, filled.
    """
    count = (leaves >= 0).sum(1, keepdim=True)
    place = torch.arange(leaves.shape[1], device=leaves.device) % count
    return tuple(tensor.gather(1, place) for tensor in (leaves, *values))


def over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes of the training, in place; itself where there is only one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def validate_trajectories(trajectories: Trajectories, batch_size: int, num_generations: int, num_leaves: int) -> None:
    """Check what a sampler returned.

    Raises:
        TypeError: not a Trajectories of tensors.
        ValueError: wrong shape, numbers that are no integers, or a number that is no leaf; the error names the place.
    """
    if not isinstance(trajectories, Trajectories):
        raise TypeError(f"The sampler returned {type(trajectories).__name__}; it must return a Trajectories.")
    shape = (batch_size, num_generations)
    for name, values in (("leaves", trajectories.leaves), ("source", trajectories.source)):
        if not isinstance(values, Tensor):
            raise TypeError(f"The sampler returned {name} as {type(values).__name__}; it must be a tensor.")
        if values.shape != shape:
            raise ValueError(
                f"The sampler returned {name} of shape {tuple(values.shape)}; it must be {shape}: {batch_size} "
                f"prompts with num_generations={num_generations} trajectories each."
            )
        if values.dtype != torch.long:
            raise ValueError(f"The sampler returned {name} of {values.dtype}; they must be integers (torch.long).")
    if trajectories.log_q is not None and trajectories.log_q.shape != shape:
        raise ValueError(f"The sampler returned log_q of shape {tuple(trajectories.log_q.shape)}; it must be {shape}.")
    leaves = trajectories.leaves
    outside = (leaves < 0) | (leaves >= num_leaves)
    if outside.any():
        row, place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"The sampler returned {leaves[row, place].item()} as trajectory {place} of row {row}, which is not a "
            f"leaf: leaves are the numbers 0 to {num_leaves - 1}. Return leaves, not items, tokens or nodes "
            f"(catalog.leaf_of(items) gives the leaf of an item)."
        )
