"""Quality metrics compared with values by hand and by brute force."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from gflowtrl.data import read_interactions
from gflowtrl.semantic_ids import ItemTokenizer, ResidualKMeans, quality_report
from gflowtrl.semantic_ids.quality import nearest_neighbors


def test_metrics_by_hand():
    """Two pairs of close vectors: one pair shares both tokens, the other one only the first."""
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    ids = {0: ("x", "p"), 1: ("x", "p"), 2: ("y", "p"), 3: ("y", "q")}
    report = quality_report(ids, vectors, num_codes=4)
    assert (report.items, report.colliding_items, report.relative_mse) == (4, 2, None)
    assert report.codes_used == [2, 2] and report.share_used == [0.5, 0.5]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert report.perplexity == pytest.approx([2.0, math.exp(entropy)])
    # all three other items are among the 10 nearest: of 6 pairs, 2 share the first token and 1 shares both
    assert report.neighbors_kept == pytest.approx([2 / 6, 1 / 6]) == report.neighbors_by_chance
    assert report.common_prefix == pytest.approx(0.5) == report.common_prefix_by_chance
    assert json.loads(json.dumps(report.as_dict()))["common_prefix"] == report.common_prefix
    assert "4 items, 2 of them share an id; relative error unknown" in str(report)


def test_neighbors_by_brute_force(vectors):
    found = nearest_neighbors(vectors, torch.tensor([3, 50]), k=5)
    for query, row in zip((3, 50), found, strict=True):
        cosines = torch.nn.functional.cosine_similarity(vectors[query], vectors)
        cosines[query] = -2
        assert sorted(row.tolist()) == sorted(cosines.argsort(descending=True)[:5].tolist())


def test_a_tokenizers_report(vectors):
    tokenizer = ItemTokenizer(ResidualKMeans(2, 20), collisions="level").fit(vectors, list(range(200)))
    report = quality_report(tokenizer, vectors)
    left = vectors - tokenizer.quantizer.decode(tokenizer.codes[:, :2])
    assert report.relative_mse == pytest.approx(
        float(left.var(0, correction=0).sum() / vectors.var(0, correction=0).sum())
    )
    assert report.colliding_items == 0 and report.share_used[2] is None and report.share_used[0] == 1.0
    # the neighbors of an item are the other nine of its cluster, and each cluster has one token
    assert report.neighbors_kept[0] > 0.7 > 0.1 > report.neighbors_by_chance[0]
    assert len(str(report).splitlines()) == 5


@pytest.mark.parametrize("row", [[1.0, 0.0], [0.1, 0.7]])
def test_equal_vectors_have_no_relative_error(row):
    items = list(range(7))
    same = torch.tensor([row]).expand(7, 2)
    tokenizer = ItemTokenizer(ResidualKMeans(1, 2), collisions="level").fit(same, items)
    report = quality_report(tokenizer, same)
    assert report.relative_mse is None and "relative error unknown" in str(report)
    json.dumps(report.as_dict(), allow_nan=False)


def test_bad_input_is_refused(vectors):
    ids = {item: (f"{item}",) for item in range(200)}
    with pytest.raises(ValueError, match="200 items but 10 rows"):
        quality_report(ids, vectors[:10])
    with pytest.raises(ValueError, match="these have \\[1, 2\\] tokens"):
        quality_report({**ids, 0: ("a", "b")}, vectors)
    with pytest.raises(ValueError, match="at least two items"):
        quality_report({0: ("a",)}, vectors[:1])
    with pytest.raises(ValueError, match="All item vectors are zero"):
        quality_report(ids, torch.zeros(200, 3))


@pytest.mark.skipif("GFLOWTRL_TEST_DATA" not in os.environ, reason="GFLOWTRL_TEST_DATA names no folder of real data")
def test_real_items_get_unique_ids():
    data = read_interactions(Path(os.environ["GFLOWTRL_TEST_DATA"]) / "office")
    tokenizer = ItemTokenizer(ResidualKMeans(balanced=True)).fit(data)
    vectors = tokenizer.embedder.embed([feature["title"] for feature in data.item_features.values()])
    published, ours = quality_report(data.semantic_ids, vectors), quality_report(tokenizer, vectors)
    assert published.colliding_items == 10 and ours.colliding_items == 0
    assert ours.neighbors_kept[0] > 5 * ours.neighbors_by_chance[0]
