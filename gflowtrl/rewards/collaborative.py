"""What a collaborative model thinks of every item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from gflowtrl.catalog import Item, ItemCatalog
from gflowtrl.teachers import as_teacher, teacher_scores

from .base import Reward, column


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gflowtrl.teachers import Teacher


class CollaborativeReward(Reward):
    """The teacher's scores as a probability: `softmax((score - c * log(count + 1)) / temperature)` over all items.

    A softmax and not the raw score, because a target over thousands of items is nearly flat otherwise. A higher
    temperature and a popularity correction c spread the target over more items. Reads the column `history`.

    Args:
        teacher: a `gflowtrl.teachers.Teacher`, or any callable `histories -> (B, items)` in the catalogue's order.
        temperature: of the softmax, > 0, in units of the teacher's scores.
        popularity_correction: c, >= 0; 0.5 is mild.
        item_counts: how often each item occurs in training: a mapping of items (missing ones count 0), or one number
            per item in the catalogue's order. Needed where c > 0.
    """

    def __init__(
        self,
        teacher: Teacher | Callable[[list[list[Item]]], Tensor],
        temperature: float = 1.0,
        popularity_correction: float = 0.0,
        item_counts: Mapping[Item, int] | Sequence[int] | Tensor | None = None,
    ):
        super().__init__("collaborative")
        if not temperature > 0:
            raise ValueError(f"The temperature of CollaborativeReward must be > 0, got {temperature}.")
        if popularity_correction < 0:
            raise ValueError(f"popularity_correction must be >= 0, got {popularity_correction}.")
        if popularity_correction and item_counts is None:
            raise ValueError("popularity_correction needs item_counts: how often each item occurs in training.")
        self.teacher, self.temperature = teacher, temperature
        self.popularity_correction, self.item_counts = popularity_correction, item_counts
        self._aligned: Teacher | None = None  # the teacher, its columns in the catalogue's order
        self._penalty: Tensor | None = None

    def bind(
        self, catalog: ItemCatalog, tokenizer: PreTrainedTokenizerBase | None = None, leaf_reduction: str = "sum"
    ) -> Self:
        if catalog is not self.catalog:
            self._aligned = as_teacher(self.teacher, catalog.items)
            if self.popularity_correction:
                self._penalty = self.popularity_correction * torch.log1p(_counts(self.item_counts, catalog.items))
        return super().bind(catalog, tokenizer, leaf_reduction)

    def score_items(self, batch: Mapping[str, Any]) -> Tensor:
        shape = (len(column(batch, "history", self.__name__)), len(self._bound_catalog()))
        scores = teacher_scores(self._aligned, batch).float()
        if scores.shape != shape:
            raise ValueError(
                f"The teacher of reward {self.__name__!r} returned scores of shape {tuple(scores.shape)}; it must "
                f"return {shape}: one row per history, one column per item."
            )
        if self._penalty is not None:
            scores = scores - self._penalty.to(scores.device)
        return torch.softmax(scores / self.temperature, 1)


def _counts(counts: Mapping[Item, int] | Sequence[int] | Tensor | None, items: Sequence[Item]) -> Tensor:
    if isinstance(counts, Mapping):
        counts = [counts.get(item, 0) for item in items]
    result = torch.as_tensor(counts, dtype=torch.float32)
    if result.shape != (len(items),):
        raise ValueError(f"item_counts has shape {tuple(result.shape)}, but the catalogue has {len(items)} items.")
    return result
