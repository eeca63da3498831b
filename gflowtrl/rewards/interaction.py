"""A reward from the interaction level of an item: shown, clicked, or purchased."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gflowtrl.catalog import Item
from gflowtrl.checks import NOT_NEGATIVE, check_number, short_repr
from gflowtrl.data import Step

from .reward import Reward


class InteractionReward(Reward):
    """The value of an item's interaction level in the session of the row; 0 for items outside the session.

    This is the interaction level r_a of GFlowGR (arXiv 2506.16114) with the values of the paper as defaults: 10 for
    purchased or liked, 1 for clicked, 0 for unseen. If an item occurs twice in a session, its higher level counts.
    Reads `target` and two columns of equal length: the items of a session and their levels 0, 1, 2, ...
    (`leave_one_out` makes these columns if the data has an event log).

    Args:
        values: value of each level 0, 1, 2, ... (shown, clicked, purchased), >= 0 and in ascending order.
        target: value of the target, independent of its level. None: the value of its level.
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
        self.items, self.levels = items, levels
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ValueError(f"values is {short_repr(values)}; give a list with a number for each level.")
        for value in values:
            check_number("a number in values", value, NOT_NEGATIVE)
        check_number("target", target, NOT_NEGATIVE, optional=True)
        self.values, self.target = [float(value) for value in values], target
        if self.values != sorted(self.values):
            raise ValueError(
                f"The values of InteractionReward are {values}; a higher level must not have a lower value."
            )

    def score_items(self, step: Step) -> Tensor:
        catalog = self._bound_catalog()
        index, values = self._item_values(step)
        # The extra last column takes the padding.
        scores = torch.zeros(len(index), len(catalog) + 1, device=catalog.device)
        return scores.scatter_(1, index % (len(catalog) + 1), values)[:, :-1]

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor:
        return self._fold_some(leaves, *self._item_values(step))

    def _item_values(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the distinct items with a value in each row, `(B, S)` positions padded with -1, and their values."""
        catalog = self._bound_catalog()
        items, levels = (step.column(name, self._owner) for name in (self.items, self.levels))
        targets = [None] * len(items) if self.target is None else step.column("target", self._owner)
        rows = [self._row_values(*row) for row in zip(range(len(items)), items, levels, targets, strict=True)]
        index = [catalog.index_of(list(row)) for row in rows]
        values = [torch.tensor(list(row.values()), dtype=torch.float32) for row in rows]
        # An extra row, cut off again, gives at least one column: a maximum over zero columns does not exist.
        index = pad_sequence([*index, torch.full((1,), -1)], True, -1)[:-1]
        values = pad_sequence([*values, torch.zeros(1)], True, 0.0)[:-1]
        return index.to(catalog.device), values.to(catalog.device)

    def _row_values(
        self, number: int, items: Sequence[Item], levels: Sequence[int], target: Item | None
    ) -> dict[Item, float]:
        if len(items) != len(levels):
            raise ValueError(
                f"{self._owner}: row {number} of the batch has {len(items)} {self.items} but {len(levels)} "
                f"{self.levels}; give one level per item."
            )
        highest: dict[Item, int] = {}
        for item, level in zip(items, levels, strict=True):
            if not (isinstance(level, int) and 0 <= level < len(self.values)):
                raise ValueError(
                    f"{self._owner}: item {item!r} in row {number} of the batch has the level {level!r}; it must be "
                    f"an integer from 0 to {len(self.values) - 1}, because {len(self.values)} values were given."
                )
            highest[item] = max(level, highest.get(item, 0))
        values = {item: self.values[level] for item, level in highest.items() if self.values[level]}
        if self.target is not None and target is not None:
            values[target] = float(self.target)
        return values

    @classmethod
    def needs(cls, spec: Mapping[str, Any]) -> set[str]:
        return {"sessions"}
