"""Samplers of observed and unobserved items draw from exactly these items, and depend on the row only."""

import math
from types import SimpleNamespace

import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.data import Step
from gflowtrl.policy import StatelessNoise
from gflowtrl.samplers import InteractionLogSampler, UnobservedSampler, validate_trajectories
from gflowtrl.samplers.leaf_sets import distinct_ranks, distinct_sorted, leaf_rows, skip_forbidden
from tests.rewards.world import make_catalog, make_step
from tests.tiny import catalog_of, random_paths


SESSIONS = [["pear", "date", "pear", "lime"], ["quince", "date", "nut", "plum", "kiwi", "fig"], ["pear"], []]


def draw(sampler, num, rows=(0, 1, 2, 3), step_number=0, **columns):
    catalog = make_catalog()
    step = make_step(rows, **{"session_items": [SESSIONS[i] for i in rows], **columns})
    noise = StatelessNoise(42).at(step_number, step.row_ids)
    drawn = sampler.sample(step, SimpleNamespace(catalog=catalog), None, num, noise)
    validate_trajectories(drawn, len(rows), num, 8)
    return drawn


def leaves_of(items):
    return set(make_catalog().leaf_of(items).tolist())


# ----------------------------------------------------------------------------------------------------- sets of leaves
@st.composite
def catalogs(draw):
    """Draw a catalog and histories with a target that leave at least one item unobserved."""
    catalog = catalog_of(random_paths(draw(st.integers(2, 60)), depth=2, codes=8, seed=draw(st.integers(0, 9))))
    items = st.sampled_from(catalog.items)
    row = st.lists(items, min_size=1, max_size=len(catalog) - 1).filter(lambda r: len(set(r)) < len(catalog))
    return catalog, draw(st.lists(row, min_size=1, max_size=4))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(catalogs())
def test_ranks_enumerate_exactly_the_allowed_leaves(world):
    catalog, rows = world
    forbidden = distinct_sorted(leaf_rows(catalog, rows))
    for number, row in enumerate(rows):
        observed = set(catalog.leaf_of(row).tolist())
        assert [leaf for leaf in forbidden[number].tolist() if leaf >= 0] == sorted(observed)
        ranks = torch.arange(len(catalog) - len(observed)).expand(len(rows), -1)
        expected = [leaf for leaf in range(len(catalog)) if leaf not in observed]
        assert skip_forbidden(ranks, forbidden)[number].tolist() == expected


def test_skip_forbidden_without_forbidden_leaves():
    ranks = torch.tensor([[0, 5]])
    for forbidden in (torch.full((1, 3), -1), torch.zeros(1, 0, dtype=torch.long)):
        assert skip_forbidden(ranks, forbidden).tolist() == [[0, 5]]


def test_subsets_are_uniform():
    """All pairs of five numbers are equally frequent. A subset that is larger than its set contains all numbers."""
    uniforms = StatelessNoise(1).at(0, torch.arange(5000)).uniform("subset", 2)
    chosen = distinct_ranks(torch.full((5000,), 5), uniforms).sort(1).values
    pairs, counts = chosen.unique(dim=0, return_counts=True)
    assert len(pairs) == 10 and (pairs[:, 0] < pairs[:, 1]).all()
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    few = distinct_ranks(torch.tensor([3, 1, 7]), uniforms[:3].repeat(1, 2))
    assert sorted(few[0].tolist()) == [-1, 0, 1, 2] and few[1].tolist() == [0, -1, -1, -1]
    assert len(set(few[2].tolist())) == 4 and few[2].min() >= 0 and few[2].max() < 7


# --------------------------------------------------------------------------------------------------------- unobserved
@settings(max_examples=15, deadline=None, derandomize=True)
@given(catalogs())
def test_unobserved_follows_its_distribution(world):
    catalog, rows = world
    columns = {"history": [row[:-1] for row in rows], "target": [row[-1] for row in rows]}
    step = Step({}, torch.arange(len(rows)), catalog.leaf_of(columns["target"]), columns)
    noise = StatelessNoise(7).at(0, step.row_ids)
    drawn = UnobservedSampler().sample(step, SimpleNamespace(catalog=catalog), None, 3000, noise)
    for number, row in enumerate(rows):
        allowed = sorted(set(range(len(catalog))) - set(catalog.leaf_of(row).tolist()))
        counts = torch.bincount(drawn.leaves[number], minlength=len(catalog))
        assert counts.sum() == counts[allowed].sum()
        assert len(allowed) == 1 or scipy.stats.chisquare(counts[allowed]).pvalue > 1e-4
        torch.testing.assert_close(drawn.log_q[number], torch.full((3000,), -math.log(len(allowed))))


def test_unobserved_excludes_leaves_not_items():
    """The item "quince" of the last history shares its leaf with "apple", so neither is drawn."""
    drawn = draw(UnobservedSampler(), 500)
    assert set(drawn.leaves[3].tolist()) == set(range(8)) - leaves_of(["kiwi", "apple"])
    assert set(drawn.leaves[0].tolist()) == set(range(8)) - leaves_of(["fig", "apple"])


def test_unobserved_without_targets():
    step = make_step(without=("target",))
    noise = StatelessNoise(42).at(0, step.row_ids)
    drawn = UnobservedSampler().sample(step, SimpleNamespace(catalog=make_catalog()), None, 500, noise)
    assert set(drawn.leaves[0].tolist()) == set(range(8)) - leaves_of(["fig"])


# ---------------------------------------------------------------------------------------------------- interaction log
@pytest.mark.parametrize("num", [1, 2, 3, 7, 12])
def test_interaction_log_draws_all_leaves_before_it_repeats_one(num):
    drawn = draw(InteractionLogSampler(), num)
    targets = make_step().columns["target"]
    for row, session in enumerate(SESSIONS):
        log = leaves_of(session) - leaves_of(targets[row : row + 1]) or leaves_of(targets[row : row + 1])
        counts = torch.bincount(drawn.leaves[row], minlength=8)
        assert set(drawn.leaves[row].tolist()) <= log
        assert counts[list(log)].max() <= math.ceil(num / len(log)) and counts[list(log)].min() >= num // len(log)
        torch.testing.assert_close(drawn.log_q[row], torch.full((num,), -math.log(len(log))))


def test_interaction_log_orders_are_uniform():
    """In 600 rows with the second session, each of its five leaves is equally often first, and second."""
    catalog = make_catalog()
    targets, columns = catalog.leaf_of(["date"] * 600), {"session_items": [SESSIONS[1]] * 600}
    step = Step({}, torch.arange(600), targets, columns)
    noise = StatelessNoise(42).at(0, step.row_ids)
    drawn = InteractionLogSampler().sample(step, SimpleNamespace(catalog=catalog), None, 2, noise)
    for leaves in drawn.leaves.unbind(1):
        counts = leaves.unique(return_counts=True)[1]
        assert len(counts) == 5 and scipy.stats.chisquare(counts).pvalue > 1e-3


def test_interaction_log_reads_another_column():
    drawn = draw(InteractionLogSampler("clicks"), 2, (0,), clicks=[["kiwi"]])
    assert set(drawn.leaves.flatten().tolist()) == leaves_of(["kiwi"])


@pytest.mark.parametrize("sampler", [InteractionLogSampler(), UnobservedSampler()])
@pytest.mark.parametrize("rows", [(2,), (3, 1), (1, 0, 3, 2)])
def test_a_row_draws_the_same_in_any_batch(sampler, rows):
    whole, part = draw(sampler, 6), draw(sampler, 6, rows)
    assert torch.equal(part.leaves, whole.leaves[list(rows)]) and torch.equal(part.log_q, whole.log_q[list(rows)])
    other = [draw(sampler, 6, step_number=number).leaves for number in (0, 1)]
    assert not torch.equal(*other)


# -------------------------------------------------------------------------------------------------------------- errors
def test_invalid_input_raises_errors():
    policy = SimpleNamespace(catalog=make_catalog())
    noise = StatelessNoise(42).at(0, make_step().row_ids)
    with pytest.raises(ValueError, match="InteractionLogSampler needs the dataset column 'session_items'; the rows h"):
        InteractionLogSampler().sample(make_step(without=("session_items",)), policy, None, 1, noise)
    with pytest.raises(TypeError, match="column of InteractionLogSampler is 3; it must be the name of a column"):
        InteractionLogSampler(3)
    with pytest.raises(ValueError, match="UnobservedSampler needs the dataset column 'history'"):
        UnobservedSampler().sample(make_step(without=("history",)), policy, None, 1, noise)
    with pytest.raises(ValueError, match="history and target of row 1 contain all 8 leaves of the catalog"):
        step = make_step(history=[["fig"], policy.catalog.items, ["fig"], ["fig"]])
        UnobservedSampler().sample(step, policy, None, 1, noise)
    with pytest.raises(ValueError, match="Item 'melon' is not in the catalog"):
        UnobservedSampler().sample(make_step(history=[["melon"]] * 4), policy, None, 1, noise)
