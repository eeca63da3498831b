"""Rows of the page against sums over all leaves."""

import math

import pytest
import torch

from gflowtrl.demo.answers import recommend, way_to
from gflowtrl.demo.drawing import draw_answer
from gflowtrl.demo.run_reward import read_run_reward
from gflowtrl.teachers import Transitions
from tests.demo.test_drawing import rows_of
from tests.demo.world import COUNTS, HISTORY, ITEMS, make_recommender, write_stage


@pytest.fixture(scope="module")
def recommender():
    return make_recommender()


@pytest.fixture(scope="module")
def reward(recommender, tmp_path_factory):
    return read_run_reward(write_stage(tmp_path_factory.mktemp("run")), recommender)


def mass_below(recommender, leaf_probs, prefix: tuple[str, ...]) -> float:
    """Sum a distribution over leaves `(N,)` over those whose id begins with the prefix."""
    paths = recommender.catalog.tree.paths.tolist()
    tokens = recommender.tokenizer.convert_tokens_to_ids(list(prefix))
    return sum(p for p, path in zip(leaf_probs.tolist(), paths, strict=True) if path[: len(tokens)] == tokens)


@pytest.mark.parametrize("item", ["i222", "twin", "short", "i110"])
def test_each_prefix_has_its_children_with_the_shares_of_the_leaves_below(recommender, reward, item):
    answer = recommend(recommender, HISTORY, reward=reward)
    (log_probs,) = recommender.policy.leaf_log_probs(recommender.prompts([HISTORY]))
    catalog = recommender.catalog
    targets = reward.of(HISTORY)(catalog.tree.leaf_nodes()).exp()
    ids = dict(zip(catalog.items, catalog.semantic_ids, strict=True))
    levels = way_to(recommender, answer, item, most=100, reward=reward)
    assert [level.prefix for level in levels] == [ids[item][:depth] for depth in range(len(ids[item]))]
    for level in levels:
        begins = len(level.prefix)
        expected = {tokens[begins] for tokens in ids.values() if tokens[:begins] == level.prefix}
        assert {child.token for child in level.children} == expected and level.choices == len(expected)
        assert [child.rank for child in level.children] == list(range(1, level.choices + 1))
        assert [child.token for child in level.children if child.taken] == [ids[item][begins]]
        probs = [child.probability for child in level.children]
        assert probs == sorted(probs, reverse=True)
        for child in level.children:
            path = (*level.prefix, child.token)
            below = [one for one, tokens in ids.items() if tokens[: len(path)] == path]
            assert child.items == len(below) and child.example in below
            for value, leaves in ((child.probability, log_probs.exp()), (child.target, targets)):
                share = mass_below(recommender, leaves, path) / mass_below(recommender, leaves, level.prefix)
                assert value == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "temperature"), [("beam", 1.0), ("sample", 1.0), ("sample", 0.5), ("sample", 2.0)]
)
def test_the_probabilities_on_the_way_multiply_to_that_of_the_list(recommender, strategy, temperature):
    answer = recommend(recommender, HISTORY, 8, strategy, temperature, seed=3)
    for row in answer.rows:
        levels = way_to(recommender, answer, row.item, most=1)
        taken = math.prod(child.probability for level in levels for child in level.children if child.taken)
        assert taken == pytest.approx(row.probability, rel=1e-4)


def test_the_token_that_is_taken_is_shown_even_if_it_is_not_among_the_best(recommender):
    answer = recommend(recommender, HISTORY, len(ITEMS))
    last = way_to(recommender, answer, answer.rows[-1].item, most=1)
    assert any(len(level.children) == 2 for level in last)
    for level in last:
        assert [child.taken for child in level.children][-1] and level.children[0].rank == 1
        assert len(level.children) == (1 if level.children[0].taken else 2)


def test_rows_are_those_of_the_recommender_with_teacher_and_target(recommender, reward):
    answer = recommend(recommender, HISTORY, 6, "sample", 0.7, seed=5, exclude_seen=True, reward=reward)
    (expected,) = recommender.recommend([HISTORY], 6, strategy="sample", temperature=0.7, seed=5, exclude_seen=True)
    assert [(row.rank, row.item, row.title) for row in answer.rows] == [
        (rank, one.item, one.title) for rank, one in enumerate(expected, 1)
    ]
    leaves = recommender.catalog.tree.leaf_nodes()
    targets = reward.of(HISTORY)(leaves).exp()
    assert float(targets.sum()) == pytest.approx(1, abs=1e-5)
    for row in answer.rows:
        explained = recommender.explain(HISTORY, row.item)
        assert (row.teacher_probability, row.teacher_rank) == (explained.teacher_probability, explained.teacher_rank)
        assert row.target == pytest.approx(float(targets[recommender.catalog.leaf_of([row.item])]), rel=1e-5)


def test_beam_search_ignores_the_temperature(recommender):
    assert recommend(recommender, HISTORY, temperature=0.3) == recommend(recommender, HISTORY)


def test_a_long_history_is_cut_for_the_target_as_it_is_for_the_model(recommender, reward):
    long = ["i111"] * 9 + HISTORY + ["i001", "i100"]
    answer, short = recommend(recommender, long, reward=reward), recommend(recommender, long[-5:], reward=reward)
    assert answer.rows == short.rows and answer.notes == ("The model reads the last 5 items of the history.",)


def test_an_empty_history_gives_popular_items_and_has_no_way(recommender, reward):
    answer = recommend(recommender, [], k=3, reward=reward)
    assert [row.item for row in answer.rows] == [ITEMS[int(i)] for i in COUNTS.argsort(descending=True)[:3]]
    assert answer.rows[0].target is None and "most frequent" in answer.notes[0]
    with pytest.raises(ValueError, match="by popularity, not from the tree. Add an item"):
        way_to(recommender, answer, answer.rows[0].item)


def test_items_that_the_teacher_does_not_know_have_no_score(tmp_path):
    few = Transitions.fit([ITEMS[:20], ITEMS[19::-3]], ITEMS[:20])
    recommender = make_recommender(teacher=few)
    answer = recommend(recommender, ["i010"], len(ITEMS))
    assert {row.item for row in answer.rows if row.teacher_rank is None} == set(ITEMS[20:])
    assert sum(row.teacher_probability or 0.0 for row in answer.rows) == pytest.approx(1, abs=1e-5)
    assert len({len(cells) for cells in rows_of(draw_answer(answer))}) == 1
    left_out = read_run_reward(write_stage(tmp_path), recommender).left_out
    assert "collaborative (the teacher does not know all items)" in left_out


def test_without_counts_and_teacher():
    recommender = make_recommender(item_counts=None, teacher=None)
    with pytest.raises(ValueError, match="no counts of popular items. Add an item"):
        recommend(recommender, [])
    row = recommend(recommender, HISTORY, 1).rows[0]
    assert (row.teacher_probability, row.teacher_rank, row.target) == (None, None, None)
    assert torch.is_grad_enabled()
