"""The reports of ranked leaves and of ranked items agree without collisions."""

import pytest
import torch

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import build_tokenizer
from gflowtrl.metrics import breadth_metrics, leaf_ranking_metrics, summarize, summarize_items


class OneItemPerLeaf:
    """A catalog where leaf i contains only item `order[i]`."""

    def __init__(self, order):
        self.order = order
        self.leaf_sizes = torch.ones(len(order), dtype=torch.long)

    def expand_leaves(self, leaves, k):
        return torch.where(leaves >= 0, self.order[leaves], -1)[:, :k]


def test_leaves_and_items_agree_without_collisions():
    generator = torch.Generator().manual_seed(0)
    catalog = OneItemPerLeaf(torch.randperm(30, generator=generator))
    leaves = torch.rand(50, 30, generator=generator).topk(10).indices
    targets = torch.randint(30, (50,), generator=generator)
    counts = torch.randint(1, 40, (30,), generator=generator)
    ks = (5, 10)
    from_leaves = summarize(leaves, targets, catalog, counts, ks)
    from_items = summarize_items(catalog.order[leaves], catalog.order[targets], counts, ks)
    assert from_leaves.metrics == pytest.approx(from_items.metrics)
    assert from_leaves.standard_errors == pytest.approx(from_items.standard_errors)
    assert {"recall@5", "item_ndcg@10", "coverage@10", "entropy@10", "gini@10", "long_tail@10"} <= set(
        from_leaves.metrics
    )
    assert all(type(value) is float for value in from_leaves.metrics.values())
    assert from_leaves.per_user["recall@10"].shape == (50,)
    assert from_leaves.metrics["recall@10"] == pytest.approx(from_leaves.per_user["recall@10"].mean().item())


def test_colliding_leaves_are_expanded_for_breadth():
    """Items 0 and 1 share leaf 0. Each item i > 1 is at leaf i - 1."""
    semantic_ids = {item: ("<a_0>", f"<b_{max(1, item)}>") for item in range(5)}
    catalog = ItemCatalog.from_semantic_ids(semantic_ids, build_tokenizer(semantic_ids))
    leaves, counts = torch.tensor([[0, 1], [0, 2]]), torch.tensor([5, 4, 3, 2, 1])
    report = summarize(leaves, torch.tensor([1, 3]), catalog, counts, (2,))
    ranking = leaf_ranking_metrics(leaves, torch.tensor([1, 3]), catalog.leaf_sizes, (2,))
    breadth = breadth_metrics(torch.tensor([[0, 1], [0, 1]]), counts, (2,))
    assert report.metrics == pytest.approx({name: v.mean().item() for name, v in ranking.items()} | breadth)
    assert report.metrics["recall@2"] == 0.5 and report.metrics["item_recall@2"] == 0


def test_short_lists_raise_errors():
    counts = torch.ones(30)
    catalog = OneItemPerLeaf(torch.arange(30))
    lists, targets = torch.arange(10)[None], torch.tensor([3])
    with pytest.raises(ValueError, match="cut-off is 20, .* only 10 leaves; use at least that many beams"):
        summarize(lists, targets, catalog, counts, (20,))
    with pytest.raises(ValueError, match="cut-off is 20, .* only 10 items; ask for at least that many"):
        summarize_items(lists, targets, counts, (20,))
    assert summarize_items(lists, targets, torch.ones(10), (20,)).metrics["recall@20"] == 1  # the whole catalog
