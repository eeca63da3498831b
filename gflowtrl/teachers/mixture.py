"""A weighted mixture of teachers."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gflowtrl.catalog import Item
from gflowtrl.checks import POSITIVE, check_choice, check_number, check_type

from .teacher import BATCH, History, Teacher, TeacherModule, as_teacher, build_teacher, score_histories


logger = logging.getLogger(__name__)
#: A weight that validation rows decide.
LEARNED = "learned"
LEAST = 1e-6  # of a learned weight: maximum likelihood would also give 0, which a mixture refuses


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
        check_type("teachers", teachers, Mapping, "a dictionary {teacher: weight}")
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
            # Of probabilities, because the logarithms would take twice as long. Probabilities below 1e-38 become 0.
            total = scores[0].softmax(-1).mul_(self.weights[0])
            for part, weight in zip(scores[1:], self.weights[1:], strict=True):
                total.add_(part.softmax(-1), alpha=weight)
            return total.log_()
        return sum(_zscore(part) * weight for part, weight in zip(scores, self.weights, strict=True))

    @torch.no_grad()
    def learn_weights(self, validation: Iterable[Mapping[str, Any]], max_history_items: int | None = None) -> float:
        """Set the weights to those with the highest likelihood of validation targets, and log them.

        The expectation-maximization algorithm for the shares of fixed distributions (Dempster et al., 1977): w_i
        becomes the mean over rows of w_i p_i / (sum over j of w_j p_j), where p_i is part i's probability of the
        target. The log-likelihood is concave in the weights, so the maximum is global.

        Args:
            validation: rows with `"history"` and `"target"`, of the validation split.
            max_history_items: histories are cut to their last items (`score_histories`).

        Returns:
            The mean log-likelihood of the targets.

        Raises:
            ValueError: there are no rows, or the normalization is not `"softmax"`, so that the parts have no shares.
        """
        rows = list(validation)
        _check_learnable(self.config["normalization"])
        if not rows:
            raise ValueError("validation has no rows, so weights cannot be learned from it; give weights as numbers.")
        probs = []
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            histories, targets = [row["history"] for row in batch], self.encode([[row["target"]] for row in batch])
            scores = [score_histories(part, histories, max_history_items) for part in self.parts]
            parts = [part.log_softmax(-1).cpu().gather(1, torch.tensor(targets)) for part in scores]
            probs.append(torch.cat(parts, 1).double().exp())
        found, log_likelihood = _most_likely_shares(torch.cat(probs))
        self.weights = found.clamp_min(LEAST).tolist()
        self.weights = [weight / sum(self.weights) for weight in self.weights]
        shares = ", ".join(f"{type(p).__name__} {w:.3f}" for p, w in zip(self.parts, self.weights, strict=True))
        logger.info("Learned weights: %s; mean log-likelihood of validation targets %.4f.", shares, log_likelihood)
        return log_likelihood

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
        normalization = options.get("normalization", "softmax")
        check_choice("normalization", normalization, ("softmax", "zscore"))
        if not isinstance(options.get("parts"), list) or not options["parts"]:
            raise ValueError("parts must list the teachers of the mixture, each with type, weight and options.")
        weights = [part.get("weight", 1.0) for part in options["parts"] if isinstance(part, Mapping)]
        if LEARNED in weights:
            _check_learnable(normalization)
            if any(weight != LEARNED for weight in weights):
                raise ValueError(
                    f"The weights of the parts are {weights}; either all of them are {LEARNED!r}, or none is."
                )

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: Mapping[str, Any]) -> "MixtureTeacher":
        """Mix the teachers of `spec["parts"]`.

        Args:
            spec: the options of the recipe.
            context: `fit`, which returns the fitted teacher of a part; for learned weights also `validation` (rows
                with whole histories) and `max_history_items`.
        """
        weights = [part.get("weight", 1.0) for part in spec["parts"]]
        learned = LEARNED in weights
        teachers = [context["fit"](part) for part in spec["parts"]]
        numbers = [1.0 if learned else float(weight) for weight in weights]
        mixture = cls(dict(zip(teachers, numbers, strict=True)), spec.get("normalization", "softmax"))
        if learned:
            mixture.learn_weights(context["validation"], context["max_history_items"])
        return mixture


def _check_learnable(normalization: str) -> None:
    if normalization != "softmax":
        raise ValueError(
            f"Weights are learned as shares of distributions: set normalization to 'softmax', not {normalization!r}."
        )


def _most_likely_shares(probs: Tensor, tolerance: float = 1e-9, max_steps: int = 10_000) -> tuple[Tensor, float]:
    """Return the shares `(parts,)` with the highest mean log-likelihood, and this value.

    Args:
        probs: `(rows, parts)`, the probability of each target by each part. A row of zeros has no influence.
    """
    probs = probs.clamp_min(torch.finfo(probs.dtype).tiny)
    shares = torch.full((probs.shape[1],), 1 / probs.shape[1], dtype=probs.dtype)
    for _ in range(max_steps):
        before, joint = shares, probs * shares
        shares = (joint / joint.sum(1, keepdim=True)).mean(0)
        if (shares - before).abs().max() < tolerance:
            break
    return shares, float((probs @ shares).log().mean())


def _zscore(scores: Tensor) -> Tensor:
    centered = scores - scores.mean(-1, keepdim=True)
    return centered / scores.std(-1, keepdim=True, correction=0).clamp_min(1e-12)
