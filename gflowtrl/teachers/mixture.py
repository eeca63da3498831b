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
    """Weighted mean of teachers, after a normalization per row, because their scores have different scales.

    - `"softmax"`: the score is `log(sum of w_i * softmax(score_i))`, and its softmax is exactly the mixture of the
      teachers' distributions. This treats the scores as logits (EASE: fit it with `validation`).
    - `"zscore"`: the score is the weighted sum of the teachers' scores, standardized in each row to mean 0 and
      standard deviation 1. It is independent of temperatures, but heavy-tailed scores (EASE) dominate the others.

    Args:
        teachers: mapping from teacher to weight. Weights are positive and are divided by their sum. All teachers must
            know the items of the first one, which also sets the order.
        normalization: `"softmax"` or `"zscore"`.
    """

    def __init__(self, teachers: Mapping[Teacher, float], normalization: str = "softmax") -> None:
        if not teachers:
            raise ValueError("teachers is empty; pass at least one teacher as {teacher: weight, ...}.")
        for weight in teachers.values():
            check_number("A weight of MixtureTeacher", weight, POSITIVE)
        check_choice("normalization", normalization, ("softmax", "zscore"))
        items = next((teacher.items for teacher in teachers if isinstance(teacher, Teacher)), None)
        if items is None:
            raise TypeError("All teachers are callables without items; wrap them with as_teacher(callable, items).")
        super().__init__(items, normalization=normalization)
        self.parts = [as_teacher(teacher, self.items) for teacher in teachers]
        self.weights = [weight / sum(teachers.values()) for weight in teachers.values()]
        # Registers the parts as submodules, so that they are moved and saved with the mixture.
        self.modules_of_parts = nn.ModuleList(part for part in self.parts if isinstance(part, nn.Module))

    def score(self, histories: Sequence[History]) -> Tensor:
        return self.combine(lambda part: part.score(histories))

    def combine(self, score: Callable[[Teacher], Tensor]) -> Tensor:
        """Compute the scores of the mixture, given a function for the scores of a part (see `teacher_scores`)."""
        scores = [score(part) for part in self.parts]
        if self.config["normalization"] == "softmax":
            logs = [part.log_softmax(-1) + math.log(w) for part, w in zip(scores, self.weights, strict=True)]
            return torch.stack(logs).logsumexp(0)
        return sum(_zscore(part) * weight for part, weight in zip(scores, self.weights, strict=True))

    def description(self) -> dict[str, Any]:
        if len(self.modules_of_parts) < len(self.parts):
            raise TypeError(
                "This mixture cannot be saved; all its parts must be built-in teachers over the same items."
            )
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
            raise ValueError("parts must list the teachers of the mixture, each with type, weight and options.")

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: Mapping[str, Any]) -> "MixtureTeacher":
        """Mix the teachers of `spec["parts"]`. `context["fit"]` returns the fitted teacher of each part."""
        parts = {context["fit"](part): float(part.get("weight", 1.0)) for part in spec["parts"]}
        return cls(parts, spec.get("normalization", "softmax"))


def _zscore(scores: Tensor) -> Tensor:
    centered = scores - scores.mean(-1, keepdim=True)
    return centered / scores.std(-1, keepdim=True, correction=0).clamp_min(1e-12)
