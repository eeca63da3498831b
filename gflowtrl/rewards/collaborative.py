"""A reward from the scores of a collaborative model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.checks import NOT_NEGATIVE, POSITIVE, check_choice, check_number
from gflowtrl.data import Step
from gflowtrl.teachers import Teacher, as_teacher, teacher_scores

from .from_spec import RewardContext
from .popularity import Counts, PopularityOptions, counts_of
from .reward import Reward


class CollaborativeReward(PopularityOptions, Reward):
    """The teacher's scores of all items, normalized per user. Reads the column `history`.

    - `normalization="softmax"`: `softmax((score - c * log(count + 1)) / temperature)`, a probability over all items.
    - `normalization="min_max"`: `((s - min s) / (max s - min s)) ** exponent` with s = score - c * log(count + 1), in
      [0, 1]. If all items have the same score, all get 1. This is the squashed score of GFlowGR (arXiv 2506.16114).
    - `normalization="standard"`: `(s - mean s) / std s`, in deviations of the user's items, of any sign; needs
      `reward_transform="exp"`. If all items have the same score, all get 0.

    The default is a softmax, because with min-max a target over thousands of items is nearly flat: the mean item gets
    about half the value of the best one. An exponent of 10, for example, corrects this. A higher temperature (or a
    lower exponent) and a popularity correction c spread the target over more items.

    Args:
        teacher: a `gflowtrl.teachers.Teacher`, or any callable `histories -> (B, items)` in the catalog's order.
        temperature: temperature of the softmax, > 0, in units of the teacher's scores. The other normalizations have
            no unit and do not use it.
        popularity_correction: c, >= 0; 0.5 is mild.
        item_counts: how often each item occurs in training: a mapping from items (missing items count 0), or one
            number per item in the catalog's order. Required if c > 0.
        normalization: "softmax", "min_max" or "standard".
        exponent: exponent of min-max, > 0. (With a softmax it would be the temperature 1 / exponent.)
    """

    provided = frozenset({"item_counts"})
    reads_target = False

    def __init__(
        self,
        teacher: Teacher | Callable[[Sequence[Sequence[Item]]], Any],
        temperature: float = 1.0,
        popularity_correction: float = 0.0,
        item_counts: Counts = None,
        normalization: str = "softmax",
        exponent: float = 1.0,
    ):
        super().__init__("collaborative")
        check_number("The temperature of CollaborativeReward", temperature, POSITIVE)
        check_number("The exponent of CollaborativeReward", exponent, POSITIVE)
        check_number("popularity_correction", popularity_correction, NOT_NEGATIVE)
        check_choice("normalization", normalization, ("softmax", "min_max", "standard"))
        if popularity_correction and item_counts is None:
            raise ValueError("popularity_correction needs item_counts; pass how often each item occurs in training.")
        if normalization != "min_max" and exponent != 1:
            raise ValueError(
                f"The exponent is {exponent}; it is used with normalization='min_max' only. For a softmax, set "
                f"temperature={temperature / exponent:g} instead; for standard scores, reward_beta."
            )
        if normalization != "softmax" and temperature != 1:
            raise ValueError(
                f"The temperature is {temperature}, but normalization={normalization!r} does not depend on a "
                f"temperature. Use the exponent (min_max) or reward_beta (standard) to sharpen or flatten the scores."
            )
        self.teacher, self.temperature = teacher, temperature
        self.popularity_correction, self.item_counts = popularity_correction, item_counts
        self.normalization, self.exponent = normalization, exponent
        self._aligned: Teacher  # the teacher with its columns in the catalog's order
        self._penalty: Tensor | None = None

    def _prepare(self, catalog: ItemCatalog) -> None:
        self._aligned = as_teacher(self.teacher, catalog.items)
        if self.popularity_correction:
            self._penalty = self.popularity_correction * torch.log1p(counts_of(self.item_counts, catalog.items))

    def score_items(self, step: Step) -> Tensor:
        self._bound_catalog()
        scores = teacher_scores(self._aligned, step, self._owner)
        if self._penalty is not None:
            scores = scores - self._penalty.to(scores.device)
        if self.normalization == "softmax":
            return torch.softmax(scores / self.temperature, 1)
        low, high = scores.aminmax(dim=1, keepdim=True)
        # The tests for equality keep NaN as NaN, which is then reported.
        if self.normalization == "standard":
            deviation, mean = torch.std_mean(scores, dim=1, keepdim=True, correction=0)
            return torch.where(high == low, 0.0, (scores - mean) / deviation)
        return torch.where(high == low, torch.ones_like(scores), (scores - low) / (high - low)) ** self.exponent

    @classmethod
    def check_spec(cls, spec: Mapping[str, Any]) -> None:
        options = {name: value for name, value in cls.without_popularity(spec).items() if name != "teacher"}
        cls(lambda histories: None, item_counts=(), **options)

    @classmethod
    def needs(cls, spec: Mapping[str, Any]) -> set[str]:
        return super().needs(spec) | (set() if "teacher" in spec else {"teacher"})

    @classmethod
    def may_be_negative(cls, spec: Mapping[str, Any]) -> bool:
        return spec.get("normalization") == "standard"

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: RewardContext) -> Self:
        options = cls.without_popularity(spec)
        return cls(
            context.teacher(options.pop("teacher", None)), item_counts=cls.counts_from(spec, context), **options
        )
