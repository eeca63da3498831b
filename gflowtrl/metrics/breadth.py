"""How much of the catalog is recommended, and how fairly: metrics over all users' lists together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ranking import DEFAULT_KS


NUM_GROUPS = 8
NUM_TAIL_GROUPS = 4


def popularity_groups(item_counts: Tensor, num_groups: int = NUM_GROUPS) -> Tensor:
    """Cuts the items, sorted by training count, into groups of equal total interactions.

    Args:
        item_counts: `(n_items,)`, how often each item occurs in the training part.

    Returns:
        LongTensor `(n_items,)`; group 0 holds the least popular items (the most of them), the last group the most
        popular ones. An item belongs where the middle of its interactions falls.
    """
    counts = item_counts.double()
    if counts.sum() <= 0:
        raise ValueError("Popularity groups need item counts, but they sum to zero; count the training interactions.")
    ordered, order = counts.sort(stable=True)
    middles = (ordered.cumsum(0) - ordered / 2) / counts.sum()
    groups = torch.empty_like(order)
    groups[order] = (middles * num_groups).long().clamp(max=num_groups - 1)
    return groups


def breadth_metrics(item_lists: Tensor, item_counts: Tensor, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """Breadth, fairness and novelty of recommended lists.

    Args:
        item_lists: LongTensor `(U, R)` of item indices, best first; -1 marks "no item".
        item_counts: `(n_items,)`, training interactions of every item, 0 included.
        ks: cut-offs.

    Returns:
        For each k, with p the items' shares of all recommendations:

        - `"coverage@k"`: distinct recommended items / items;
        - `"entropy@k"`: -sum p log p, in nats;
        - `"gini@k"`: sum_i (2i - n - 1) p_(i) / n over ascending p, items never recommended included; 0 is equal;
        - `"top3_share@k"`: share of the three most recommended items;
        - `"long_tail@k"`: share of recommendations from the 4 least popular of 8 `popularity_groups`;
        - `"novelty@k"`: mean of -log2((count + 1) / (total + n)) over recommendations, in bits;
        - `"dgu@k"`, `"mgu@k"`: with d the groups' shares of recommendations minus their shares of the training
          interactions, max d - min d and mean |d|.
    """
    num_items = len(item_counts)
    item_counts = item_counts.to(item_lists.device).double()
    groups = popularity_groups(item_counts)
    history = _group_shares(item_counts, groups)
    surprise = -torch.log2((item_counts + 1) / (item_counts.sum() + num_items))
    ascending = torch.arange(1, num_items + 1, device=item_lists.device) * 2 - num_items - 1
    metrics: dict[str, float] = {}
    for k in ks:
        shown = item_lists[:, :k]
        times = torch.bincount(shown[shown >= 0], minlength=num_items).double()
        if not times.any():
            raise ValueError("Breadth is not defined for empty recommendation lists; give at least one item.")
        shares = times / times.sum()
        by_group = _group_shares(times, groups)
        difference = by_group - history
        values = {
            "coverage": (times > 0).double().mean(),
            "entropy": torch.special.entr(shares).sum(),
            "gini": (ascending * shares.sort().values).sum() / num_items,
            "top3_share": shares.topk(min(3, num_items)).values.sum(),
            "long_tail": by_group[:NUM_TAIL_GROUPS].sum(),
            "novelty": shares @ surprise,
            "dgu": difference.max() - difference.min(),
            "mgu": difference.abs().mean(),
        }
        metrics |= {f"{name}@{k}": value.item() for name, value in values.items()}
    return metrics


def _group_shares(counts: Tensor, groups: Tensor) -> Tensor:
    return counts.new_zeros(NUM_GROUPS).index_add_(0, groups, counts) / counts.sum()
