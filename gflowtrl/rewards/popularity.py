"""Corrections for how often items were shown or taken, which rewards share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gflowtrl.catalog import Item
from gflowtrl.checks import check_choice, short_repr

from .from_spec import FromSpec, RewardContext


#: What the counts of a correction count; the option `popularity` of a recipe.
POPULARITY = ("interactions", "impressions")
Counts = Mapping[Item, int] | Sequence[int] | Tensor | None


def counts_of(counts: Counts, items: Sequence[Item]) -> Tensor:
    """Return one count per item as floats, `(items,)`; items that are missing in a mapping have 0.

    Raises:
        TypeError: the counts are not numbers.
        ValueError: there is not one count per item, or a count is negative, NaN or infinite.
    """
    if isinstance(counts, Mapping):
        counts = [counts.get(item, 0) for item in items]
    try:
        result = torch.as_tensor(counts, dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"item_counts is {short_repr(counts)}; give a number per item, or {{item: number}}.") from None
    if result.shape != (len(items),):
        raise ValueError(f"item_counts has shape {tuple(result.shape)}, but the catalog has {len(items)} items.")
    if len(wrong := (~(result.isfinite() & (result >= 0))).nonzero()):
        item, count = items[int(wrong[0])], result[wrong[0]].item()
        raise ValueError(f"item_counts has {count} for item {item!r}; a count must be a number of at least 0.")
    return result


class PopularityOptions(FromSpec):
    """Methods of a reward class with the options `popularity` (what is counted) and `item_counts` (the counts)."""

    @classmethod
    def option_names(cls) -> set[str]:
        return super().option_names() | {"popularity"}

    @classmethod
    def needs(cls, spec: Mapping[str, Any]) -> set[str]:
        return super().needs(spec) | ({"impressions"} if spec.get("popularity") == "impressions" else set())

    @staticmethod
    def without_popularity(spec: Mapping[str, Any]) -> dict[str, Any]:
        """Return the other options.

        Raises:
            ValueError: an unknown kind of counts.
        """
        check_choice("popularity", spec.get("popularity", POPULARITY[0]), POPULARITY)
        return {name: value for name, value in spec.items() if name != "popularity"}

    @staticmethod
    def counts_from(spec: Mapping[str, Any], context: RewardContext) -> Tensor:
        """Return the counts that a recipe asks for."""
        return context.counts(spec.get("popularity", POPULARITY[0]))
