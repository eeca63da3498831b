"""How far the user went with an item: shown, clicked, bought."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gflowtrl.catalog import Item
from gflowtrl.data import Step

from .reward import Reward


class InteractionReward(Reward):
    """Values graded by the interaction level of an item in the row's session; 0 for every item outside of it.

    The interaction level r_a of GFlowGR (arXiv 2506.16114), whose numbers are the defaults: bought or liked 10,
    clicked 1, unseen 0. An item that is in the session twice counts with its higher level. Reads two columns of equal
    length, the items of a session and their levels 0, 1, 2, ... (`leave_one_out` makes them where there is an event
    log), and `target`.

    Args:
        values: what level 0, 1, 2, ... is worth (shown, clicked, purchased), >= 0 and never falling.
        target: what the target is worth, whatever its level; None: what its level is worth.
        items, levels: names of the two columns.
    """

    def __init__(
        self,
        values: Sequence[float] = (0.0, 1.0, 10.0),
        target: float | None = 10.0,
        items: str = "session_items",
        levels: str = "session_levels",
    ):
        super().__init__("interaction")
        self.values, self.target = [float(value) for value in values], target
        self.items, self.levels = items, levels
        graded = [*self.values] if target is None else [*self.values, float(target)]
        if not self.values or not all(math.isfinite(value) and value >= 0 for value in graded):
            raise ValueError(
                f"The values of InteractionReward must be finite and >= 0, got {values}, target {target}."
            )
        if self.values != sorted(self.values):
            raise ValueError(
                f"A higher level must not be worth less, but the values of InteractionReward are {values}."
            )

    def score_items(self, step: Step) -> Tensor:
        catalog = self._bound_catalog()
        index, values = self._graded(step)
        # The last column takes the padding.
        scores = torch.zeros(len(index), len(catalog) + 1, device=catalog.device)
        return scores.scatter_(1, index % (len(catalog) + 1), values)[:, :-1]

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor:
        return self._fold_some(leaves, *self._graded(step))

    def _graded(self, step: Step) -> tuple[Tensor, Tensor]:
        """Distinct items of each row that are worth something, `(B, S)` positions padded with -1, and their values."""
        catalog = self._bound_catalog()
        items, levels = (step.column(name, self._owner) for name in (self.items, self.levels))
        targets = [None] * len(items) if self.target is None else step.column("target", self._owner)
        rows = [self._row(*row) for row in zip(range(len(items)), items, levels, targets, strict=True)]
        index = [catalog.index_of(list(row)) for row in rows]
        values = [torch.tensor(list(row.values()), dtype=torch.float32) for row in rows]
        # One more row, to be cut off, makes one column at least: a maximum over none does not exist.
        index = pad_sequence([*index, torch.full((1,), -1)], True, -1)[:-1]
        values = pad_sequence([*values, torch.zeros(1)], True, 0.0)[:-1]
        return index.to(catalog.device), values.to(catalog.device)

    def _row(
        self, number: int, items: Sequence[Item], levels: Sequence[int], target: Item | None
    ) -> dict[Item, float]:
        if len(items) != len(levels):
            raise ValueError(
                f"Reward {self.__name__!r}: row {number} of the batch has {len(items)} {self.items} but {len(levels)} "
                f"{self.levels}; give one level per item."
            )
        best: dict[Item, int] = {}
        for item, level in zip(items, levels, strict=True):
            if not (isinstance(level, int) and 0 <= level < len(self.values)):
                raise ValueError(
                    f"Reward {self.__name__!r}: item {item!r} in row {number} of the batch has the level {level!r}; "
                    f"{len(self.values)} values were given, so levels are 0 to {len(self.values) - 1}."
                )
            best[item] = max(level, best.get(item, 0))
        worth = {item: self.values[level] for item, level in best.items() if self.values[level]}
        if self.target is not None and target is not None:
            worth[target] = float(self.target)
        return worth

    @classmethod
    def needs(cls, spec: Mapping[str, Any]) -> set[str]:
        return {"sessions"}
