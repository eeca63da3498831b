"""All metrics of one row of a results table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gflowtrl.catalog import ItemCatalog, SeenItems

from .breadth import breadth_metrics
from .ranking import DEFAULT_KS, item_ranking_metrics, leaf_ranking_metrics
from .statistics import mean_and_error


#: Prefix of the metrics of rankings from which the items that a user has had are removed.
UNSEEN = "unseen_"


@dataclass
class RankingReport:
    """Result of `summarize` and `summarize_items`.

    Attributes:
        metrics: floats by name: `"recall@10"`, `"item_ndcg@10"`, `"coverage@10"`, ... Ranking metrics are means over
            users.
        standard_errors: standard errors of the ranking metrics, under the same names.
        per_user: ranking metrics per user, float tensors `(U,)`, for `paired_bootstrap`.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    per_user: dict[str, Tensor]

    def with_unseen(self, unseen: RankingReport) -> RankingReport:
        """Return a report that also holds `unseen`, the metrics of rankings without seen items, under names that begin
        with `"unseen_"`."""

        def named(values: dict) -> dict:
            return {f"{UNSEEN}{name}": value for name, value in values.items()}

        return RankingReport(
            self.metrics | named(unseen.metrics),
            self.standard_errors | named(unseen.standard_errors),
            self.per_user | named(unseen.per_user),
        )


def summarize(
    leaf_lists: Tensor,
    target_leaves: Tensor,
    catalog: ItemCatalog,
    item_counts: Tensor,
    ks: Sequence[int] = DEFAULT_KS,
    seen: SeenItems | None = None,
) -> RankingReport:
    """Compute ranking and breadth metrics of ranked leaves, as returned by beam search.

    Args:
        leaf_lists: LongTensor `(U, R)`, best first; -1 means "no leaf". R must be at least the largest cut-off (or the
            number of leaves), because shorter lists would lower the metrics without notice.
        target_leaves: LongTensor `(U,)`.
        catalog: expands each leaf to its items for the breadth metrics.
        item_counts: `(n_items,)`, training interactions in the order of `catalog.items`.
        ks: cut-offs.
        seen: items of each user that do not count as recommended, from `catalog.seen_items(histories, targets)`; the
            lists come from a search that excludes `seen.leaves`.

    Raises:
        ValueError: the lists are shorter than the largest cut-off, or `seen` holds a target.
    """
    _check_width(leaf_lists, len(catalog.leaf_sizes), ks, "leaves; use at least that many beams")
    leaf_lists, target_leaves = leaf_lists.cpu(), target_leaves.cpu()
    if seen is not None and bool((seen.leaves == target_leaves[:, None]).any()):
        raise ValueError("seen holds the target of a user. Give the targets to catalog.seen_items.")
    per_user = leaf_ranking_metrics(leaf_lists, target_leaves, catalog.leaf_sizes.cpu(), ks, seen)
    return _report(per_user, catalog.expand_leaves(leaf_lists, max(ks), seen).cpu(), item_counts, ks)


def summarize_items(
    item_lists: Tensor, targets: Tensor, item_counts: Tensor, ks: Sequence[int] = DEFAULT_KS
) -> RankingReport:
    """Compute the metrics of `summarize` for ranked items `(U, R)`, as returned by `top_items`, and targets `(U,)`.

    Both are item indices. Items do not collide, so the item metrics (`"item_recall@10"`, ...) equal the plain ones.
    """
    _check_width(item_lists, len(item_counts), ks, "items; ask for at least that many")
    item_lists = item_lists.cpu()
    per_user = item_ranking_metrics(item_lists, targets.cpu(), ks)
    per_user |= {f"item_{name}": values for name, values in per_user.items() if not name.startswith("mrr")}
    return _report(per_user, item_lists, item_counts, ks)


def _report(per_user: dict[str, Tensor], item_lists: Tensor, item_counts: Tensor, ks: Sequence[int]) -> RankingReport:
    summary = {name: mean_and_error(values) for name, values in per_user.items()}
    metrics = {name: mean for name, (mean, _) in summary.items()} | breadth_metrics(item_lists, item_counts.cpu(), ks)
    return RankingReport(metrics, {name: error for name, (_, error) in summary.items()}, per_user)


def _check_width(lists: Tensor, available: int, ks: Sequence[int], remedy: str) -> None:
    if lists.shape[1] < min(max(ks), available):
        raise ValueError(f"The largest cut-off is {max(ks)}, but the lists have only {lists.shape[1]} {remedy}.")
