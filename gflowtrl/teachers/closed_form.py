"""Teachers in closed form: EASE and popularity."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import POSITIVE, check_number

from .teacher import History, TeacherModule


class EASE(TeacherModule):
    """Embarrassingly shallow autoencoder (Steck, WWW 2019): a linear item-item model in closed form.

    The scores are the summed weights of the distinct items of the history, regardless of order, divided by
    `temperature`. The temperature turns the scores into logits (see `fit`) and does not change the ranking. The
    recommendations are less accurate but much broader than those of SASRec. Time grows with the cube and memory with
    the square of the number of items, so EASE is suitable for up to about 30,000 items.

    Args:
        items: the catalog, in the order of the score columns.
        temperature: divisor of the scores.
    """

    bounds = {"regularization": POSITIVE, "temperature": POSITIVE}
    temperature_grid = tuple(2.0**-power for power in range(11))

    def __init__(self, items: Sequence[Item], temperature: float = 1.0) -> None:
        check_number("temperature", temperature, POSITIVE)
        super().__init__(items, temperature=temperature)
        self.register_buffer("weights", torch.zeros(len(self.items), len(self.items)))

    @torch.no_grad()
    def score(self, histories: Sequence[History]) -> Tensor:
        rows = [sorted(set(row)) for row in self.encode(histories)]
        flat = torch.tensor([index for row in rows for index in row], dtype=torch.long, device=self.device)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long, device=self.device)
        scores = F.embedding_bag(flat, self.weights, lengths.cumsum(0) - lengths, mode="sum")
        return scores / self.config["temperature"]

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        train_sequences: Iterable[History],
        items: Sequence[Item],
        validation: Iterable[Mapping[str, Any]] | None = None,
        *,
        regularization: float = 100.0,
    ) -> "EASE":
        """Fit the weights and, with `validation` rows (`"history"`, `"target"`), the temperature.

        The temperature is the value of `temperature_grid` with the highest mean log-softmax of the targets.
        """
        cls.check_options(regularization=regularization)
        teacher = cls(items)
        gram = torch.zeros(len(teacher.items), len(teacher.items))
        for row in teacher.encode(train_sequences):
            index = torch.tensor(row, dtype=torch.long).unique()
            gram[index[:, None], index] += 1
        gram.diagonal().add_(regularization)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        teacher.weights.copy_((inverse / -inverse.diagonal()).fill_diagonal_(0.0))
        if rows := list(validation or []):
            grid = cls.temperature_grid
            log_likelihoods = [
                torch.stack([-F.cross_entropy(scores / value, targets, reduction="sum") for value in grid])
                for scores, targets in teacher.scored(rows)
            ]
            teacher.config["temperature"] = grid[int(sum(log_likelihoods).argmax())]
        return teacher


class Popularity(TeacherModule):
    """The same scores for all histories: log(training count + 1), so that their softmax is smoothed popularity."""

    def __init__(self, items: Sequence[Item]) -> None:
        super().__init__(items)
        self.register_buffer("counts", torch.zeros(len(self.items)))

    def score(self, histories: Sequence[History]) -> Tensor:
        return self.counts.log1p().expand(len(histories), -1)

    @classmethod
    def fit(cls, train_sequences: Iterable[History], items: Sequence[Item]) -> "Popularity":
        teacher = cls(items)
        flat = torch.tensor([index for row in teacher.encode(train_sequences) for index in row], dtype=torch.long)
        teacher.counts.copy_(torch.bincount(flat, minlength=len(teacher.items)))
        return teacher
