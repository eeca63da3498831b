"""Breadth, fairness and novelty metrics of the recommendation lists of all users together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ranking import DEFAULT_KS


NUM_GROUPS = 8
NUM_TAIL_GROUPS = 4


def popularity_groups(item_counts: Tensor) -> Tensor:
    """Split the items, sorted by training count, into 8 groups with equal numbers of interactions.

    Args:
        item_counts: `(n_items,)`, how often each item occurs in the training split.

    Returns:
        LongTensor `(n_items,)`. Group 0 contains the least popular items (the largest number of items), the last group
        the most popular ones. The middle of an item's interactions determines its group.

    Raises:
        ValueError: the counts sum to zero.
    """
    counts = item_counts.double()
    if counts.sum() <= 0:
        raise ValueError("The item counts sum to zero; count the training interactions for popularity groups.")
    ordered, order = counts.sort(stable=True)
    middles = (ordered.cumsum(0) - ordered / 2) / counts.sum()
    groups = torch.empty_like(order)
    groups[order] = (middles * NUM_GROUPS).long().clamp(max=NUM_GROUPS - 1)
    return groups


def breadth_metrics(item_lists: Tensor, item_counts: Tensor, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """Compute breadth, fairness and novelty of recommendation lists.

    Args:
        item_lists: LongTensor `(U, R)` of item indices, best first; -1 means "no item".
        item_counts: `(n_items,)`, training interactions of every item, including 0.
        ks: cut-offs.

    Returns:
        For each k, where p are the shares of the items in all recommendations:

        - `"coverage@k"`: number of distinct recommended items / number of items;
        - `"entropy@k"`: -sum p log p, in nats;
        - `"gini@k"`: sum_i (2i - n - 1) p_(i) / n over ascending p, including items that are never recommended; 0 for
          equal shares;
        - `"top3_share@k"`: share of the three most recommended items;
        - `"long_tail@k"`: share of recommendations from the 4 least popular of the 8 `popularity_groups`;
        - `"novelty@k"`: mean of -log2((count + 1) / (total + n)) over recommendations, in bits;
        - `"dgu@k"`, `"mgu@k"`: max d - min d and mean |d|, where d is the share of recommendations of each group minus
          its share of the training interactions.

    Raises:
        ValueError: the lists contain no items, or the counts sum to zero.
    """
    num_items = len(item_counts)
    item_counts = item_counts.to(item_lists.device).double()
    groups = popularity_groups(item_counts)
    training_shares = _group_shares(item_counts, groups)
    surprise = -torch.log2((item_counts + 1) / (item_counts.sum() + num_items))
    ascending = torch.arange(1, num_items + 1, device=item_lists.device) * 2 - num_items - 1
    metrics: dict[str, float] = {}
    for k in ks:
        recommended = item_lists[:, :k]
        counts = torch.bincount(recommended[recommended >= 0], minlength=num_items).double()
        if not counts.any():
            raise ValueError("Breadth is not defined for empty recommendation lists; pass at least one item.")
        shares = counts / counts.sum()
        group_shares = _group_shares(counts, groups)
        difference = group_shares - training_shares
        values = {
            "coverage": (counts > 0).double().mean(),
            "entropy": torch.special.entr(shares).sum(),
            "gini": (ascending * shares.sort().values).sum() / num_items,
            "top3_share": shares.topk(min(3, num_items)).values.sum(),
            "long_tail": group_shares[:NUM_TAIL_GROUPS].sum(),
            "novelty": shares @ surprise,
            "dgu": difference.max() - difference.min(),
            "mgu": difference.abs().mean(),
        }
        metrics |= {f"{name}@{k}": value.item() for name, value in values.items()}
    return metrics


def _group_shares(counts: Tensor, groups: Tensor) -> Tensor:
    return counts.new_zeros(NUM_GROUPS).index_add_(0, groups, counts) / counts.sum()
