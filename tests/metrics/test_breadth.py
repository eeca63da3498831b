"""Breadth metrics, compared with their definitions in plain Python."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.metrics import breadth_metrics, popularity_groups


@st.composite
def recommendations(draw):
    num_items = draw(st.integers(3, 15))
    counts = draw(st.lists(st.integers(0, 30), min_size=num_items, max_size=num_items).filter(any))
    width = draw(st.integers(1, 5))
    entry = st.integers(-1, num_items - 1)
    lists = draw(st.lists(st.lists(entry, min_size=width, max_size=width), min_size=1, max_size=6))
    lists[0][0] = draw(st.integers(0, num_items - 1))
    return lists, counts


def groups_by_definition(counts):
    total, before, groups = sum(counts), 0, [0] * len(counts)
    for item in sorted(range(len(counts)), key=lambda item: (counts[item], item)):
        groups[item] = min(7, (8 * (2 * before + counts[item])) // (2 * total))
        before += counts[item]
    return groups


def breadth_by_definition(lists, counts, k):
    shown = Counter(item for row in lists for item in row[:k] if item >= 0)
    n, total, interactions = len(counts), shown.total(), sum(counts)
    shares = sorted(shown[item] / total for item in range(n))
    groups = groups_by_definition(counts)
    recommended, history = [0.0] * 8, [0.0] * 8
    for item in range(n):
        recommended[groups[item]] += shown[item] / total
        history[groups[item]] += counts[item] / interactions
    difference = [r - h for r, h in zip(recommended, history, strict=True)]
    novelty = sum(-times * math.log2((counts[item] + 1) / (interactions + n)) for item, times in shown.items())
    return {
        "coverage": len(shown) / n,
        "entropy": -sum(p * math.log(p) for p in shares if p),
        "gini": sum((2 * i - n - 1) * p for i, p in enumerate(shares, start=1)) / n,
        "top3_share": sum(times for _, times in shown.most_common(3)) / total,
        "long_tail": sum(recommended[:4]),
        "novelty": novelty / total,
        "dgu": max(difference) - min(difference),
        "mgu": sum(map(abs, difference)) / 8,
    }


@given(recommendations())
@settings(max_examples=150, deadline=None)
def test_breadth_follows_its_definitions(case):
    lists, counts = case
    metrics = breadth_metrics(torch.tensor(lists), torch.tensor(counts), (1, 4))
    assert len(metrics) == 16
    for k in (1, 4):
        for name, value in breadth_by_definition(lists, counts, k).items():
            assert metrics[f"{name}@{k}"] == pytest.approx(value, abs=1e-9), (name, k)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=200).filter(any))
@settings(max_examples=100, deadline=None)
def test_popularity_groups_are_ordered_and_of_nearly_equal_interactions(counts):
    counts = torch.tensor(counts)
    groups = popularity_groups(counts)
    order = counts.argsort(stable=True)
    assert (groups[order].diff() >= 0).all()
    totals = torch.zeros(8).index_add_(0, groups, counts.float())
    assert (totals - counts.sum() / 8).abs().max() <= counts.max()


def test_equal_and_concentrated_recommendations():
    counts = torch.ones(16)
    equal = breadth_metrics(torch.arange(16)[:, None], counts, (1,))
    assert equal["coverage@1"] == 1 and equal["entropy@1"] == pytest.approx(math.log(16))
    assert equal["gini@1"] == pytest.approx(0) and equal["mgu@1"] == pytest.approx(0)
    assert equal["long_tail@1"] == pytest.approx(0.5) and equal["novelty@1"] == pytest.approx(4)
    single = breadth_metrics(torch.zeros(16, 1, dtype=torch.long), counts, (1,))
    assert single["entropy@1"] == 0 and single["gini@1"] == pytest.approx(15 / 16)


def test_empty_input_raises_errors():
    with pytest.raises(ValueError, match="item counts sum to zero"):
        popularity_groups(torch.zeros(4))
    with pytest.raises(ValueError, match="empty recommendation lists"):
        breadth_metrics(torch.full((2, 3), -1), torch.ones(4), (3,))
