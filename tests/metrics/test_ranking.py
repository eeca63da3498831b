"""Ranking metrics, compared with their definitions for each user in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.metrics import group_means, item_ranking_metrics, leaf_ranking_metrics


@st.composite
def ranked_leaves(draw):
    num_leaves = draw(st.integers(1, 9))
    sizes = draw(st.lists(st.integers(1, 4), min_size=num_leaves, max_size=num_leaves))
    width = draw(st.integers(1, num_leaves))
    users = draw(st.integers(1, 4))
    lists = []
    for _ in range(users):
        order = draw(st.permutations(range(num_leaves)))[:width]
        cut = draw(st.integers(0, width))
        lists.append(order[:cut] + [-1] * (width - cut))
    targets = draw(st.lists(st.integers(0, num_leaves - 1), min_size=users, max_size=users))
    return lists, targets, sizes


def by_definition(ranked, target, sizes, k):
    result = {"recall": 0.0, "ndcg": 0.0, "mrr": 0.0, "item_recall": 0.0, "item_ndcg": 0.0}
    before = 0
    for rank, leaf in enumerate(ranked, start=1):
        if leaf == -1:
            continue
        if leaf == target:
            if rank <= k:
                result |= {"recall": 1.0, "ndcg": 1 / math.log2(rank + 1), "mrr": 1 / rank}
            size = sizes[leaf]
            inside = min(size, max(0, k - before))
            result["item_recall"] = inside / size
            result["item_ndcg"] = sum(1 / math.log2(before + i + 1) for i in range(1, inside + 1)) / size
        before += sizes[leaf]
    return result


@given(ranked_leaves())
@settings(max_examples=150, deadline=None)
def test_leaf_metrics_follow_their_definitions(case):
    lists, targets, sizes = case
    ks = (1, 3, 10)
    metrics = leaf_ranking_metrics(torch.tensor(lists), torch.tensor(targets), torch.tensor(sizes), ks)
    assert len(metrics) == 5 * len(ks)
    for user, (ranked, target) in enumerate(zip(lists, targets, strict=True)):
        for k in ks:
            for name, value in by_definition(ranked, target, sizes, k).items():
                assert metrics[f"{name}@{k}"][user].item() == pytest.approx(value, abs=1e-6), (name, k)


@given(ranked_leaves(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_item_metrics_are_the_mean_over_orders_inside_a_leaf(case, k):
    """The item metrics of leaves equal the metrics of items, averaged over the items of the target's leaf."""
    lists, targets, sizes = case
    metrics = leaf_ranking_metrics(torch.tensor(lists), torch.tensor(targets), torch.tensor(sizes), (k,))
    for user, (ranked, target) in enumerate(zip(lists, targets, strict=True)):
        items = [(leaf, copy) for leaf in ranked if leaf >= 0 for copy in range(sizes[leaf])]
        number = {item: index for index, item in enumerate(items)}
        item_targets = [number.get((target, copy), len(items)) for copy in range(sizes[target])]
        ranking = torch.arange(max(1, len(items)))[None].expand(len(item_targets), -1)
        expected = item_ranking_metrics(ranking, torch.tensor(item_targets), (k,))
        if not items:
            continue
        for name in ("recall", "ndcg"):
            actual = metrics[f"item_{name}@{k}"][user].item()
            assert actual == pytest.approx(expected[f"{name}@{k}"].mean().item(), abs=1e-6)


def test_item_metrics_by_hand():
    metrics = item_ranking_metrics(
        torch.tensor([[4, 2, 7], [1, 2, -1], [-1, -1, -1]]), torch.tensor([7, 9, 0]), (2, 3)
    )
    assert metrics["recall@2"].tolist() == [0, 0, 0]
    assert metrics["recall@3"].tolist() == [1, 0, 0]
    assert metrics["ndcg@3"].tolist() == [0.5, 0, 0]
    assert metrics["mrr@3"].tolist() == pytest.approx([1 / 3, 0, 0])


def test_an_absent_target_does_not_match_the_padding():
    metrics = item_ranking_metrics(torch.tensor([[3, -1]]), torch.tensor([-1]), (2,))
    assert metrics["recall@2"].item() == 0


def test_group_means():
    means = group_means(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([2, 2, 0]), 3)
    assert means[[0, 2]].tolist() == [0.5, 0.5] and means[1].isnan()
