"""Teachers that have not seen the training rows that they score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import at_least, check_number, check_type
from gflowtrl.data.step import Step

from .mixture import MixtureTeacher
from .teacher import History, Teacher, TeacherModule, build_teacher


FOLDS = at_least(2)


class CrossFitTeacher(MixtureTeacher):
    """Copies of a teacher, each fitted without one fold of the users (cross-fitting).

    A teacher knows the targets of the rows that it was fitted to by heart, so a policy that learns from it on the same
    rows hardly learns more than the targets. Here the scores of a training row come from the copy that was fitted
    without the row's user, and say what the teacher expects of a new user. All other histories, such as those of the
    validation and test rows, get the mean of the copies' distributions.

    Reads the column `user` of training rows.

    Args:
        teachers: copy f, for f = 0 ... folds - 1, was fitted without the users of fold f (`fold_of`).

    Raises:
        ValueError: there are fewer than two copies.

    References:
        Dao and others, Knowledge Distillation as Semiparametric Inference, ICLR 2021 (section 4, cross-fitting).
    """

    def __init__(self, teachers: Sequence[TeacherModule]) -> None:
        check_type("teachers", teachers, list | tuple, "a list of teachers")
        check_number("The number of teachers of CrossFitTeacher", len(teachers), FOLDS)
        super().__init__(dict.fromkeys(teachers, 1.0))

    def combine_rows(self, step: Step, score: Callable[[Teacher], Tensor]) -> Tensor:
        """Compute the scores of a step's rows, given a function for the scores of a copy (see `teacher_scores`)."""
        users, folds = step.column("user", "CrossFitTeacher"), len(self.parts)
        fold = torch.tensor([fold_of(user, folds) for user in users], dtype=torch.long)
        scores = [score(part) for part in self.parts]
        found = torch.empty_like(scores[0])
        for number, values in enumerate(scores):
            own = (fold == number).to(values.device)[:, None]
            found = torch.where(own, values, found)
        return found

    def description(self) -> dict[str, Any]:
        return {**super().description(), "class": "CrossFitTeacher"}

    @classmethod
    def from_config(cls, items: Sequence[Item], config: Mapping[str, Any]) -> CrossFitTeacher:
        return cls([build_teacher(part, items) for part in config["parts"]])


def fold_of(user: Item, folds: int) -> int:
    """Return the fold of a user, which depends on the user's name and the number of folds only."""
    return crc32(repr(user).encode()) % folds


def without_fold(sequences: Sequence[History], users: Sequence[Item], fold: int, folds: int) -> list[History]:
    """Return the sequences of the users outside of a fold: the training data of copy `fold`."""
    check_number("folds", folds, FOLDS)
    check_number("fold", fold, at_least(0))
    if fold >= folds:
        raise ValueError(f"fold is {fold}; it must be below the number of folds, {folds}.")
    return [sequence for sequence, user in zip(sequences, users, strict=True) if fold_of(user, folds) != fold]
