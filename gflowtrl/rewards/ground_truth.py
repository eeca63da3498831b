"""A reward for the logged target item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from gflowtrl.catalog import ItemCatalog
from gflowtrl.checks import NOT_NEGATIVE, POSITIVE, check_number
from gflowtrl.data import Step

from .from_spec import RewardContext
from .popularity import Counts, PopularityOptions, counts_of
from .reward import Reward


class GroundTruthReward(PopularityOptions, Reward):
    """1 for the logged target, 0 for all other items. Reads the column `target`.

    On its own, this reward makes a GFlowNet learn what supervised fine-tuning learns. In a sum, its weight sets the
    share of the logged item in the target distribution (the interaction level r_a of GFlowGR, arXiv 2506.16114).

    With a popularity correction c, the target gets ((mean count + 1) / (count + 1)) ** c instead of 1, at most `clip`:
    clipped inverse propensity weights (Bottou et al., JMLR 2013; Schnabel et al., ICML 2016), with c = 1 for
    propensities that are proportional to the counts. What was hardly ever shown and still was taken counts more.

    Args:
        popularity_correction: c, >= 0.
        item_counts: how often each item was shown or taken: a mapping from items (missing items count 0), or one
            number per item in the catalog's order. Required if c > 0.
        clip: largest value, > 0.
    """

    provided = frozenset({"item_counts"})

    def __init__(self, popularity_correction: float = 0.0, item_counts: Counts = None, clip: float = 10.0) -> None:
        super().__init__("ground_truth")
        check_number("popularity_correction", popularity_correction, NOT_NEGATIVE)
        check_number("clip", clip, POSITIVE)
        if popularity_correction and item_counts is None:
            raise ValueError("popularity_correction needs item_counts; pass how often each item was shown or taken.")
        self.popularity_correction, self.item_counts, self.clip = popularity_correction, item_counts, clip
        self._values: Tensor | None = None  # of each item as the target; None: 1

    def _prepare(self, catalog: ItemCatalog) -> None:
        if self.popularity_correction:
            counts = counts_of(self.item_counts, catalog.items)
            ratios = (counts.mean() + 1) / (counts + 1)
            self._values = (ratios**self.popularity_correction).clamp(max=self.clip)

    def score_items(self, step: Step) -> Tensor:
        catalog = self._bound_catalog()
        index, values = self._targets(step, catalog)
        index, values = index.to(catalog.device), values.to(catalog.device)
        rewards = torch.zeros(len(index), len(catalog), device=index.device)
        return rewards.scatter_(1, index[:, None], values[:, None])

    def score_leaves(self, step: Step, leaves: Tensor) -> Tensor:
        catalog = self._bound_catalog()
        index, values = self._targets(step, catalog)
        target = catalog.item_leaf[index.to(catalog.item_leaf.device)].to(leaves.device)
        return (leaves == target[:, None]) * values.to(leaves.device)[:, None]

    def _targets(self, step: Step, catalog: ItemCatalog) -> tuple[Tensor, Tensor]:
        """Return the position of each row's target in the catalog and its value, both `(B,)`."""
        index = catalog.index_of(step.column("target", self._owner))
        return index, torch.ones(len(index)) if self._values is None else self._values[index]

    @classmethod
    def check_spec(cls, spec: Mapping[str, Any]) -> None:
        if not spec.get("popularity_correction"):
            for name in ("popularity", "clip"):
                if name in spec:
                    raise ValueError(
                        f"{name} is used with a popularity_correction only. Set one, or leave {name} out."
                    )
        cls(item_counts=(), **cls.without_popularity(spec))

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], context: RewardContext) -> Self:
        options = cls.without_popularity(spec)
        counts = cls.counts_from(spec, context) if options.get("popularity_correction") else None
        return cls(item_counts=counts, **options)
