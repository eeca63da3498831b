"""Ranking metrics with one target per user. Results are per user, so that they can be averaged and bootstrapped."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gflowtrl.catalog import SeenItems


DEFAULT_KS = (5, 10, 20)


def primary_cutoff(ks: Sequence[int]) -> int:
    """Return the cut-off for checkpoint selection and the results table: 10, or the largest one if 10 is missing."""
    return 10 if 10 in ks else max(ks)


def item_ranking_metrics(items: Tensor, targets: Tensor, ks: Sequence[int] = DEFAULT_KS) -> dict[str, Tensor]:
    """Compute recall, NDCG and MRR of ranked lists.

    Args:
        items: LongTensor `(U, R)`, best first, without repetitions; -1 means "no item".
        targets: LongTensor `(U,)`.
        ks: cut-offs. A list that is shorter than a cut-off is scored without padding.

    Returns:
        `"recall@k"` (target within the first k), `"ndcg@k"` (1 / log2(rank + 1)), `"mrr@k"` (1 / rank), each a float
        tensor `(U,)`.
    """
    hits = (items == targets[:, None]) & (items >= 0)
    ranks = torch.where(hits.any(1), hits.int().argmax(1) + 1, torch.iinfo(torch.long).max).double()
    metrics = {}
    for k in ks:
        inside = ranks <= k
        metrics[f"recall@{k}"] = inside.float()
        metrics[f"ndcg@{k}"] = torch.where(inside, 1 / torch.log2(ranks + 1), 0.0).float()
        metrics[f"mrr@{k}"] = torch.where(inside, 1 / ranks, 0.0).float()
    return metrics


def leaf_ranking_metrics(
    leaves: Tensor,
    target_leaves: Tensor,
    leaf_sizes: Tensor,
    ks: Sequence[int] = DEFAULT_KS,
    seen: SeenItems | None = None,
) -> dict[str, Tensor]:
    """Compute ranking metrics of ranked leaves, both plain and corrected for collisions.

    The plain metrics (`"recall@k"`, `"ndcg@k"`, `"mrr@k"`), which published tables use, treat a leaf as one item. The
    item metrics (`"item_recall@k"`, `"item_ndcg@k"`) are the expectation over the unknown order of the items at each
    leaf: with G items at the target's leaf and P items before it, eff = min(G, max(0, k - P)) of its items are within
    the cut-off. Item recall is eff / G, and item NDCG is (1 / G) * sum over i = 1 .. eff of 1 / log2(P + i + 1).
    Without collisions, both are equal.

    Args:
        leaves: LongTensor `(U, R)`, best first, without repetitions; -1 means "no leaf".
        target_leaves: LongTensor `(U,)`.
        leaf_sizes: LongTensor `(N,)`, number of items at each leaf (`catalog.leaf_sizes`).
        ks: cut-offs, in leaves for the plain metrics and in items for the item metrics.
        seen: items of each user that do not count as items of their leaf, without the target.

    Returns:
        Float tensors `(U,)`.
    """
    metrics = item_ranking_metrics(leaves, target_leaves, ks)
    sizes, target_sizes = torch.where(leaves >= 0, leaf_sizes[leaves], 0), leaf_sizes[target_leaves]
    if seen is not None:
        sizes = sizes - seen.counts(leaves)
        target_sizes = target_sizes - seen.counts(target_leaves[:, None]).squeeze(1)
    hits = (leaves == target_leaves[:, None]) & (leaves >= 0)
    before = ((sizes.cumsum(1) - sizes) * hits).sum(1)
    longest = max(ks, default=1)
    # discounts[p] is the sum of the first p terms 1 / log2(position + 1), so the gain of a leaf is a difference.
    discounts = 1 / torch.log2(torch.arange(longest, dtype=torch.double, device=leaves.device) + 2)
    discounts = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)])
    for k in ks:
        inside = torch.minimum(target_sizes, (k - before).clamp(min=0)) * hits.any(1)
        gain = discounts[(before + inside).clamp(max=longest)] - discounts[before.clamp(max=longest)]
        metrics[f"item_recall@{k}"] = (inside / target_sizes).float()
        metrics[f"item_ndcg@{k}"] = (gain / target_sizes).float()
    return metrics


def group_means(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Average per-user values by group, for example recall by the popularity group of the target.

    Args:
        values: float tensor `(U,)`.
        groups: LongTensor `(U,)` with entries in [0, num_groups).

    Returns:
        Float tensor `(num_groups,)`, NaN for a group without users.
    """
    sums = values.new_zeros(num_groups, dtype=torch.double).index_add_(0, groups, values.double())
    return (sums / torch.bincount(groups, minlength=num_groups)).float()
