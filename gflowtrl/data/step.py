"""One micro-batch of a training step, as samplers, rewards and teachers see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.trunks import Prompts, some_prompts

from .windows import Windows


T = TypeVar("T")

#: Arguments of a reward function that are not dataset columns (TRL's reward signature, and `items`).
REWARD_ARGUMENTS = (
    *("prompts", "completions", "completion_ids", "items"),
    *("trainer_state", "log_extra", "log_metric"),
)


def check_column_names(names: Iterable[str]) -> None:
    """Refuse columns that would collide with an argument of reward functions.

    Raises:
        ValueError: names the first such column and the remedy.
    """
    for name in names:
        if name in REWARD_ARGUMENTS:
            raise ValueError(
                f"The dataset column {name!r} has the name of an argument of reward functions, so no reward could "
                f"read it. Rename it, for example with dataset.rename_column({name!r}, 'my_{name}')."
            )


@dataclass(frozen=True, eq=False)
class Step:
    """One micro-batch of B prompts.

    Attributes:
        prompts: separate ones or windows, what a `TreePolicy` reads.
        row_ids: `(B,)` long, the dataset's number of each row. Random numbers follow from it.
        target_leaves: `(B,)` long, the leaf of each row's target; -1 where the target is hidden.
        columns: the dataset's columns, untouched, under their own names: lists of length B. `history` and `target`
            are among them.
        progress: share of the training that is done, in [0, 1).
        windows: the items that the prompts hold; None: those of the column `history`, all of them.
    """

    prompts: Prompts
    row_ids: Tensor
    target_leaves: Tensor
    columns: Mapping[str, list[Any]]
    progress: float = 0.0
    windows: Windows | None = None
    # Not an argument, so that dataclasses.replace makes a step that computes anew.
    _memo: dict[tuple[int, str], tuple[object, Any]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        row_ids: Tensor,
        columns: Mapping[str, list[Any]],
        catalog: ItemCatalog,
        progress: float = 0.0,
        windows: Windows | None = None,
    ) -> Step:
        """A step from its columns: target leaves are those of the column `target`, -1 where there is none.

        Args:
            prompts: as `prompts` of the step.
            row_ids: `(B,)` long; moved to the catalog's device, on which the step computes.
            columns: lists of length B by name.
            catalog: finds the leaves.
            progress, windows: as those of the step.

        Raises:
            ValueError: a target is not in the catalog.
        """
        row_ids = row_ids.to(catalog.device)
        leaves = catalog.leaf_of(columns["target"]) if "target" in columns else torch.full_like(row_ids, -1)
        return cls(prompts, row_ids, leaves, columns, progress, windows)

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any], catalog: ItemCatalog, progress: float = 0.0) -> Step:
        """A step from a batch of `GroupCollator`. The catalog is moved to the prompts' device.

        Raises:
            ValueError: a target is not in the catalog.
        """
        catalog = catalog.to(batch["prompts"]["input_ids"].device)
        rows = batch["rows"]
        return cls.of(batch["prompts"], batch["row_ids"], rows.columns, catalog, progress, rows.windows)

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def device(self) -> torch.device:
        return self.row_ids.device

    def column(self, name: str, owner: str) -> list[Any]:
        """A dataset column.

        Args:
            name: of the column.
            owner: who needs it, for the error.

        Raises:
            ValueError: there is no such column; the message lists those that exist.
        """
        if name not in self.columns:
            raise ValueError(f"{owner} needs the dataset column {name!r}; the rows have {sorted(self.columns)}.")
        return self.columns[name]

    def histories(self, owner: str) -> Sequence[Sequence[Item]]:
        """The items of each prompt, which may be fewer than those of the column `history`.

        Args:
            owner: who needs them, for the error.

        Raises:
            ValueError: there are neither windows nor a column `history`.
        """
        return self.column("history", owner) if self.windows is None else self.windows.histories

    def once(self, owner: object, name: str, compute: Callable[[], T]) -> T:
        """`compute()`, computed the first time only. Who shares an owner and a name shares the result.

        Args:
            owner: the object that the result belongs to, told apart by identity; it is kept alive with the step.
            name: tells apart several results of one owner.
            compute: makes the result.
        """
        key = (id(owner), name)
        if key not in self._memo:
            self._memo[key] = (owner, compute())
        return self._memo[key][1]

    def rows(self, rows: slice) -> Step:
        """Some rows as a step with a memo of its own."""
        return Step(
            prompts=some_prompts(self.prompts, rows),
            row_ids=self.row_ids[rows],
            target_leaves=self.target_leaves[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
            progress=self.progress,
            windows=None if self.windows is None else self.windows.rows(rows),
        )
