"""One micro-batch of a training step, the input of samplers, rewards and teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    """Check that no column has the name of an argument of reward functions.

    Raises:
        ValueError: for the first such column; the message says how to rename it.
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
        prompts: separate prompts or windows, the input of a `TreePolicy`.
        row_ids: `(B,)` long, the dataset's id of each row. Random numbers are a function of it.
        target_leaves: `(B,)` long, the leaf of each row's target; -1 if the target is hidden.
        columns: the unchanged dataset columns by name, lists of length B, including `history` and `target`.
        progress: completed share of the training, in [0, 1).
        windows: the items that the prompts contain; None: all items of the column `history`.
    """

    prompts: Prompts
    row_ids: Tensor
    target_leaves: Tensor
    columns: Mapping[str, list[Any]]
    progress: float = 0.0
    windows: Windows | None = None
    # Not an argument, so that dataclasses.replace creates a step with an empty memo.
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
        """Create a step whose target leaves are those of the column `target`, -1 without such a column.

        Args:
            prompts, progress, windows: attributes of the step.
            row_ids: `(B,)` long; moved to the catalog's device, which becomes the device of the step.
            columns: lists of length B by name.
            catalog: maps targets to leaves.

        Raises:
            ValueError: if a target is not in the catalog.
        """
        row_ids = row_ids.to(catalog.device)
        leaves = catalog.leaf_of(columns["target"]) if "target" in columns else torch.full_like(row_ids, -1)
        return cls(prompts, row_ids, leaves, columns, progress, windows)

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any], catalog: ItemCatalog, progress: float = 0.0) -> Step:
        """Create a step from a batch of `GroupCollator`. The catalog is moved to the device of the prompts.

        Raises:
            ValueError: if a target is not in the catalog.
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
        """Return a dataset column.

        Args:
            name: name of the column.
            owner: who needs the column, for the error message.

        Raises:
            ValueError: if the column does not exist; the message lists the existing ones.
        """
        if name not in self.columns:
            raise ValueError(f"{owner} needs the dataset column {name!r}; the rows have {sorted(self.columns)}.")
        return self.columns[name]

    def histories(self, owner: str) -> Sequence[Sequence[Item]]:
        """Return the items of each prompt, which may be fewer than those of the column `history`.

        Args:
            owner: who needs them, for the error message.

        Raises:
            ValueError: if there are neither windows nor a column `history`.
        """
        return self.column("history", owner) if self.windows is None else self.windows.histories

    def once(self, owner: object, name: str, compute: Callable[[], T]) -> T:
        """Return `compute()`, memoized by owner and name.

        Args:
            owner: the object that the result belongs to, compared by identity; the step keeps it alive.
            name: distinguishes several results of one owner.
            compute: computes the result on the first call.
        """
        key = (id(owner), name)
        if key not in self._memo:
            self._memo[key] = (owner, compute())
        return self._memo[key][1]

    def rows(self, rows: slice) -> Step:
        """Return a slice of the rows as a step with its own memo."""
        return replace(
            self,
            prompts=some_prompts(self.prompts, rows),
            row_ids=self.row_ids[rows],
            target_leaves=self.target_leaves[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
            windows=None if self.windows is None else self.windows.rows(rows),
        )
