"""The reports of ranked leaves and of ranked items agree without collisions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.catalog import ItemCatalog
from gflowtrl.data import build_tokenizer
from gflowtrl.metrics import breadth_metrics, leaf_ranking_metrics, summarize, summarize_items


class OneItemPerLeaf:
    """A catalog where leaf i contains only item `order[i]`."""

    def __init__(self, order):
        self.order = order
        self.leaf_sizes = torch.ones(len(order), dtype=torch.long)

    def expand_leaves(self, leaves, k, seen=None):
        assert seen is None
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


@given(st.lists(st.integers(0, 4), min_size=2, max_size=10), st.data())
@settings(max_examples=100, deadline=None)
def test_seen_items_do_not_count(codes, data):
    """As if the seen items, but not the targets, were in no catalog: each user's own catalog is the oracle."""
    names, ks = [f"i{n}" for n in range(len(codes))], (1, 3)
    catalog = ItemCatalog(names, [(f"t{c}",) for c in codes], torch.tensor(codes)[:, None])
    counts, size = torch.arange(1, len(codes) + 1), catalog.tree.num_leaves
    item = st.sampled_from(names)
    histories = data.draw(st.lists(st.lists(item), min_size=1, max_size=4))
    targets = data.draw(st.lists(item, min_size=len(histories), max_size=len(histories)))
    seen = catalog.seen_items(histories, targets)
    lists = []
    for closed in seen.leaves.tolist():
        open_leaves = data.draw(st.permutations([leaf for leaf in range(size) if leaf not in closed]))
        lists.append(open_leaves + [-1] * (size - len(open_leaves)))
    leaves, target_leaves = torch.tensor(lists), catalog.leaf_of(targets)
    report = summarize(leaves, target_leaves, catalog, counts, ks, seen)
    items = []
    for row, (history, target) in enumerate(zip(histories, targets, strict=True)):
        left = [n for n, name in enumerate(names) if name not in history or name == target]
        own = ItemCatalog([names[n] for n in left], [catalog.semantic_ids[n] for n in left],
                          catalog.item_token_ids[left])  # fmt: skip
        number = {int(catalog.item_leaf[n]): int(own.item_leaf[place]) for place, n in enumerate(left)}
        ranked = torch.tensor([[number[leaf] for leaf in lists[row] if leaf >= 0]])
        expected = leaf_ranking_metrics(ranked, own.leaf_of([target]), own.leaf_sizes, ks)
        for name, value in expected.items():
            assert report.per_user[name][row] == pytest.approx(value.item()), name
        found = [names.index(own.items[i]) for i in own.expand_leaves(ranked, max(ks))[0].tolist() if i >= 0]
        items.append(found + [-1] * (max(ks) - len(found)))
    assert report.metrics.items() >= breadth_metrics(torch.tensor(items), counts, ks).items()


def test_both_columns_are_in_one_report_and_a_seen_target_is_refused():
    semantic_ids = {item: (f"<a_{item}>",) for item in range(4)}
    catalog = ItemCatalog.from_semantic_ids(semantic_ids, build_tokenizer(semantic_ids))
    seen, counts = catalog.seen_items([[0, 1], [3, 0]], [2, 3]), torch.ones(4)
    assert seen.leaves.tolist() == [[0, 1], [0, -1]]
    targets, ks = torch.tensor([2, 3]), (1, 2)
    main = summarize(torch.tensor([[0, 2], [0, 1]]), targets, catalog, counts, ks)
    unseen = summarize(torch.tensor([[2, 3], [1, 3]]), targets, catalog, counts, ks, seen)
    both = main.with_unseen(unseen)
    assert (both.metrics["recall@1"], both.metrics["unseen_recall@1"]) == (0, 0.5)
    assert (both.metrics["item_recall@2"], both.metrics["unseen_item_recall@2"]) == (0.5, 1)
    assert both.standard_errors["unseen_recall@1"] == unseen.standard_errors["recall@1"]
    assert both.per_user["unseen_recall@1"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="Give the targets to catalog.seen_items"):
        summarize(torch.tensor([[2, 3], [1, 3]]), targets, catalog, counts, ks, catalog.seen_items([[2], [0]]))


def test_short_lists_raise_errors():
    counts = torch.ones(30)
    catalog = OneItemPerLeaf(torch.arange(30))
    lists, targets = torch.arange(10)[None], torch.tensor([3])
    with pytest.raises(ValueError, match="cut-off is 20, .* only 10 leaves; use at least that many beams"):
        summarize(lists, targets, catalog, counts, (20,))
    with pytest.raises(ValueError, match="cut-off is 20, .* only 10 items; ask for at least that many"):
        summarize_items(lists, targets, counts, (20,))
    assert summarize_items(lists, targets, torch.ones(10), (20,)).metrics["recall@20"] == 1  # the whole catalog
