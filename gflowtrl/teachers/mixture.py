"""A weighted mixture of teachers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gflowtrl.catalog import Item
from gflowtrl.checks import POSITIVE, check_choice, check_number

from .teacher import History, Teacher, TeacherModule, as_teacher, build_teacher


class MixtureTeacher(TeacherModule):
    """Weighted mean of teachers, each normalized per row first, since their scores have unrelated scales.

    - `"softmax"`: the score is `log(sum of w_i * softmax(score_i))`; its softmax is exactly the mixture of the
      teachers' distributions. It takes their scores as logits (EASE: fit it with `validation`).
    - `"zscore"`: the sum of `w_i` times the scores with mean 0 and standard deviation 1 in each row. Free of any
      temperature, but heavy-tailed scores (EASE) then outweigh others.

    Args:
        teachers: teacher to weight; weights are positive and are divided by their sum. All teachers must know the
            items of the first one, whose order is used.
        normalization: `"softmax"` or `"zscore"`.
    """

    def __init__(self, teachers: Mapping[Teacher, float], normalization: str = "softmax") -> None:
        if not teachers:
            raise ValueError("A mixture needs at least one teacher; give {teacher: weight, ...}.")
        for weight in teachers.values():
            check_number("A weight of MixtureTeacher", weight, POSITIVE)
        check_choice("normalization", normalization, ("softmax", "zscore"))
        items = next((teacher.items for teacher in teachers if isinstance(teacher, Teacher)), None)
        if items is None:
            raise TypeError("A mixture of plain callables has no items; wrap them with as_teacher(callable, items).")
        super().__init__(items, normalization=normalization)
        self.parts = [as_teacher(teacher, self.items) for teacher in teachers]
        self.weights = [weight / sum(teachers.values()) for weight in teachers.values()]
        # Registers the tensors of the parts with the mixture, so that moving and saving it moves and saves them.
        self.modules_of_parts = nn.ModuleList(part for part in self.parts if isinstance(part, nn.Module))

    def score(self, histories: Sequence[History]) -> Tensor:
        return self.combine(lambda part: part.score(histories))

    def combine(self, score: Callable[[Teacher], Tensor]) -> Tensor:
        """The mixture's scores from a function that gives a part's scores (see `teacher_scores`)."""
        scores = [score(part) for part in self.parts]
        if self.config["normalization"] == "softmax":
            logs = [part.log_softmax(-1) + math.log(w) for part, w in zip(scores, self.weights, strict=True)]
            return torch.stack(logs).logsumexp(0)
        return sum(_zscore(part) * weight for part, weight in zip(scores, self.weights, strict=True))

    def description(self) -> dict[str, Any]:
        if len(self.modules_of_parts) < len(self.parts):
            raise TypeError("A mixture is saved only if all its parts are built-in teachers over the same items.")
        parts = [part.description() for part in self.modules_of_parts]
        return {"class": "MixtureTeacher", "config": {**self.config, "parts": parts, "weights": self.weights}}

    @classmethod
    def from_config(cls, items: Sequence[Item], config: Mapping[str, Any]) -> "MixtureTeacher":
        parts = [build_teacher(part, items) for part in config["parts"]]
        return cls(dict(zip(parts, config["weights"], strict=True)), config["normalization"])

    @classmethod
    def option_names(cls) -> set[str]:
        return {"parts", "normalization"}

    @classmethod
    def check_options(cls, **options: Any) -> None:
        check_choice("normalization", options.get("normalization", "softmax"), ("softmax", "zscore"))
        if not isinstance(options.get("parts"), list) or not options["parts"]:
            raise ValueError("parts must list the mixture's teachers, each with type, weight and options.")

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: Mapping[str, Any]) -> "MixtureTeacher":
        """Mix the teachers of `spec["parts"]`; `context["fit"]` turns each of them into a fitted teacher."""
        parts = {context["fit"](part): float(part.get("weight", 1.0)) for part in spec["parts"]}
        return cls(parts, spec.get("normalization", "softmax"))


def _zscore(scores: Tensor) -> Tensor:
    centered = scores - scores.mean(-1, keepdim=True)
    return centered / scores.std(-1, keepdim=True, correction=0).clamp_min(1e-12)
