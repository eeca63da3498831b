"""Teachers whose scores become logits through a temperature."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import POSITIVE, check_number

from .teacher import History, TeacherModule


class CalibratedTeacher(TeacherModule):
    """Base class of teachers whose scores (sums of weights, cosines) are not logits by nature.

    The score is `raw_scores / temperature`. `calibrate` chooses the temperature by maximum likelihood, so that
    `softmax(score)` is a distribution over the next item. The temperature does not change the ranking. A subclass
    implements `raw_scores` and calls `calibrate` at the end of its `fit`.

    Args:
        items: the catalog, in the order of the score columns.
        temperature: divisor of the raw scores.
        **config: arguments of the subclass, see `TeacherModule`.
    """

    temperature_grid = tuple(2.0**-power for power in range(11))

    def __init__(self, items: Sequence[Item], temperature: float = 1.0, **config: Any) -> None:
        check_number("temperature", temperature, POSITIVE)
        super().__init__(items, temperature=temperature, **config)

    def raw_scores(self, histories: Sequence[History]) -> Tensor:
        """Score all items before the temperature: a float tensor `(B, len(items))`."""
        raise NotImplementedError

    @torch.no_grad()
    def score(self, histories: Sequence[History]) -> Tensor:
        return self.raw_scores(histories) / self.config["temperature"]

    @torch.no_grad()
    def calibrate(self, validation: Iterable[Mapping[str, Any]] | None) -> None:
        """Set the temperature to the value of `temperature_grid` with the highest mean log-softmax of the targets.

        Args:
            validation: rows with `"history"` and `"target"`. Without rows, the temperature does not change.
        """
        rows, grid = self.validation_rows(validation), self.temperature_grid
        if not rows:
            return
        self.config["temperature"] = 1.0
        log_likelihoods = [
            torch.stack([-F.cross_entropy(scores / value, targets, reduction="sum") for value in grid])
            for scores, targets in self.scored(rows)
        ]
        self.config["temperature"] = grid[int(sum(log_likelihoods).argmax())]
