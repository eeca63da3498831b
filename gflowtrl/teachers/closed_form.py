"""Teachers in closed form: EASE and popularity."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import POSITIVE

from .calibrated import CalibratedTeacher
from .teacher import History, TeacherModule


class EASE(CalibratedTeacher):
    """Embarrassingly shallow autoencoder (Steck, WWW 2019): a linear item-item model in closed form.

    The raw scores are the summed weights of the distinct items of the history, regardless of order. The
    recommendations are less accurate but much broader than those of SASRec. Time grows with the cube and memory with
    the square of the number of items, so EASE is suitable for up to about 30,000 items.

    Args:
        items: the catalog, in the order of the score columns.
        temperature: divisor of the scores (`CalibratedTeacher`).
    """

    bounds = {"regularization": POSITIVE}

    def __init__(self, items: Sequence[Item], temperature: float = 1.0) -> None:
        super().__init__(items, temperature)
        self.register_buffer("weights", torch.zeros(len(self.items), len(self.items)))

    @torch.no_grad()
    def raw_scores(self, histories: Sequence[History]) -> Tensor:
        rows = [sorted(set(row)) for row in self.encode(histories)]
        flat = torch.tensor([index for row in rows for index in row], dtype=torch.long, device=self.device)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long, device=self.device)
        return F.embedding_bag(flat, self.weights, lengths.cumsum(0) - lengths, mode="sum")

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
        """Fit the weights and, with `validation` rows (`"history"`, `"target"`), the temperature."""
        cls.check_options(regularization=regularization)
        teacher = cls(items)
        gram = torch.zeros(len(teacher.items), len(teacher.items))
        for row in teacher.encode(train_sequences):
            index = torch.tensor(row, dtype=torch.long).unique()
            gram[index[:, None], index] += 1
        gram.diagonal().add_(regularization)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        teacher.weights.copy_((inverse / -inverse.diagonal()).fill_diagonal_(0.0))
        teacher.calibrate(validation)
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
