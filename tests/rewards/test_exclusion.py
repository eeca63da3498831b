"""`exclude_history`: items of the user's history get no reward. Compared with sums over items written as loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.policy import StatelessNoise
from gflowtrl.rewards import CompositeReward, DenseReward, SampledReward, TopKReward
from gflowtrl.rewards.exclusion import contains
from gflowtrl.samplers import build_sampler
from tests.rewards.world import SEMANTIC_IDS, TOKENIZER, TableTeacher, all_leaves, make_catalog, make_policy, make_step


ITEMS = list(SEMANTIC_IDS)
HISTORIES = [["apple", "fig", "fig"], ["apple", "quince", "date"], ["pear", "nut", "plum"], ["quince", "kiwi"]]
TARGETS = ["lime", "date", "pear", "plum"]
histories = st.lists(st.lists(st.sampled_from(ITEMS), min_size=1, max_size=12), min_size=4, max_size=4)
targets = st.lists(st.sampled_from(ITEMS), min_size=4, max_size=4)


class Table:
    """A reward with a value per row and item, or per row and leaf."""

    def __init__(self, values, of="items"):
        if of == "items":
            self.score_items = lambda step: values[step.row_ids - 10]
        else:
            self.score_leaves = lambda step, leaves: values[step.row_ids - 10].gather(1, leaves)


def seen(row, histories=HISTORIES, targets=TARGETS):
    return {*histories[row]} - {targets[row]}


def values(seed=0, columns=9, low=0.0):
    return torch.rand(4, columns, generator=torch.Generator().manual_seed(seed)) + low


@given(histories, targets)
@settings(max_examples=60, deadline=None)
def test_which_leaves_are_excluded(histories, targets):
    catalog, step = make_catalog(), make_step(history=histories, target=targets)
    leaves = CompositeReward(Table(values()), catalog, exclude_history=True).of(step).excluded_leaves
    for row in range(4):
        gone = seen(row, histories, targets)
        closed = [leaf for leaf in range(8) if gone.issuperset(catalog.items_of(leaf))]
        assert [leaf for leaf in leaves[row].tolist() if leaf >= 0] == closed
        found = contains(leaves, torch.arange(-1, 8).expand(4, -1))[row]
        assert found.tolist() == [False, *(leaf in closed for leaf in range(8))]


@pytest.mark.parametrize("transform", ["power", "exp"])
@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_each_item_before_folding(transform, reduction, floor):
    """Two rewards of items and one of leaves; under "exp" some of the values are negative."""
    catalog, step = make_catalog(), make_step(history=HISTORIES, target=TARGETS)
    low = -0.7 if transform == "exp" else 0.05
    tables, weights, beta = [values(1, low=low), values(2, low=low), values(3, 8, low)], [1.0, 0.5, 2.0], 1.5
    rewards = [Table(tables[0]), Table(tables[1]), Table(tables[2], of="leaves")]
    options = dict(weights=weights, transform=transform, beta=beta, floor=floor, leaf_reduction=reduction)
    composite = CompositeReward(rewards, catalog, exclude_history=True, **options)
    result = composite.score_drawn(step, all_leaves(catalog, step))
    fold = sum if reduction == "sum" else max
    for row in range(4):
        r = []
        for leaf in range(8):
            kept = [catalog.items.index(item) for item in catalog.items_of(leaf) if item not in seen(row)]
            parts = [fold(float(table[row, i]) for i in kept) for table in tables[:2]] if kept else [0, 0]
            total = sum(w * part for w, part in zip(weights, [*parts, float(tables[2][row, leaf])], strict=True))
            r.append(total if kept else None)
        if transform == "exp":
            known = [0.0 if value is None else math.exp(beta * value) for value in r]
            least = floor * sum(known) / 8
            expected = [least if value is None else big for value, big in zip(r, known, strict=True)]
        else:
            known = [value or 0.0 for value in r]
            expected = [max(value, floor * sum(known) / 8) ** beta for value in known]
        torch.testing.assert_close(result.log_rewards[row].exp(), torch.tensor(expected), rtol=1e-4, atol=1e-6)
        assert result.excluded[row].tolist() == [value is None for value in r]


@pytest.mark.parametrize("transform", ["power", "exp"])
def test_all_ways_to_compute_r_agree(transform):
    """The full table, the best items and drawn leaves; with R = 0, because floors of drawn leaves differ."""
    catalog, step = make_catalog(), make_step(history=HISTORIES, target=TARGETS)
    options = dict(transform=transform, floor=0.0, exclude_history=True)
    leaves = all_leaves(catalog, step)

    def price(items, **_):  # a plain callable, leaf by leaf
        return [0.5 + len(group) for group in items]

    dense = CompositeReward(Table(values(4, low=0.1)), catalog, **options).of(step)
    best = CompositeReward(Table(values(4, low=0.1)), catalog, max_elements=8, top_items=8, **options).of(step)
    drawn = CompositeReward([Table(values(4, low=0.1)), price], catalog, TOKENIZER, [1, 0], **options).of(step)
    assert isinstance(dense, DenseReward) and isinstance(best, TopKReward) and isinstance(drawn, SampledReward)
    nodes = torch.arange(catalog.tree.num_nodes).expand(4, -1)
    torch.testing.assert_close(best.log_flows(nodes).exp(), dense.log_flows(nodes).exp())
    for other in (best, drawn):
        torch.testing.assert_close(other.log(leaves), dense.log(leaves))
        assert torch.equal(other.score(leaves).excluded, dense.score(leaves).excluded)
        assert torch.equal(other.excluded_leaves, dense.excluded_leaves)


def test_no_reward_is_the_least_one():
    """Losses on rewards, such as GRPO, must not prefer an item of the history to an item with a negative reward."""
    catalog, step = make_catalog(), make_step(history=HISTORIES, target=TARGETS)
    table, leaves = values(low=-2.0), all_leaves(catalog, step)
    for transform, rewards in (("exp", Table(table)), ("power", Table(-table))):
        result = CompositeReward(rewards, catalog, transform=transform, exclude_history=True).of(step).score(leaves)
        for values_of_row, gone in zip(result.rewards, result.excluded, strict=True):
            assert gone.any() and (values_of_row[gone] <= values_of_row[~gone].min()).all()


def test_a_group_of_items_of_the_history_has_finite_rewards_under_exp():
    catalog, step = make_catalog(), make_step(history=HISTORIES, target=TARGETS)
    composite = CompositeReward(
        lambda items, **_: [-3.0 for _ in items], catalog, TOKENIZER, transform="exp", exclude_history=True
    )
    gone = catalog.leaf_of(["fig", "quince", "nut", "kiwi"])[:, None].expand(4, 3)
    result = composite.of(step).score(gone)
    assert result.excluded.all() and result.log_rewards.isfinite().all() and result.rewards.isfinite().all()


def test_a_plain_callable_keeps_a_leaf_with_another_item():
    catalog, step = make_catalog(), make_step(history=HISTORIES, target=TARGETS)
    composite = CompositeReward(
        lambda items, **_: [2.0 for _ in items], catalog, TOKENIZER, floor=0.0, exclude_history=True
    )
    shared = catalog.leaf_of(["apple"]).expand(4, 1)  # with quince: row 1 has had both
    assert composite.of(step).log(shared).exp().flatten().tolist() == pytest.approx([2, 0, 2, 2])


def test_one_row_in_two_steps():
    """Rows of a chunk are computed like those of the whole step."""
    catalog = make_catalog()
    composite = CompositeReward(Table(values(5)), catalog, exclude_history=True)
    step = make_step(history=HISTORIES, target=TARGETS)
    leaves, part = all_leaves(catalog, step), step.rows(slice(2, 3))
    assert torch.equal(composite.of(part).log(leaves[2:3]), composite.of(step).log(leaves)[2:3])


SAMPLERS = ["collaborative", "uniform", "reward", "unobserved", "curriculum", "low_confidence", "interaction_log"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_do_not_draw_excluded_leaves(name):
    """The prompt shows only the last item of each history; the earlier ones are excluded too."""
    catalog = make_catalog()
    sessions = {"session_items": [["fig", "date"], ["apple", "lime"], ["nut", "lime", "pear"], ["kiwi", "fig"]]}
    step = make_step(history=HISTORIES, target=TARGETS, **sessions)
    reward = CompositeReward(Table(values(6)), catalog, floor=0.5, exclude_history=True).of(step)
    sampler = build_sampler(name, teacher=TableTeacher())
    found = [
        sampler.sample(step, make_policy(catalog), reward, 6, StatelessNoise(number).at(0, step.row_ids)).leaves
        for number in range(30)
    ]
    assert not contains(reward.excluded_leaves, torch.cat(found, 1)).any()


def test_uniform_over_the_others():
    catalog, step = make_catalog(), make_step(history=HISTORIES, target=TARGETS)
    reward = CompositeReward(Table(values(6)), catalog, exclude_history=True).of(step)
    noise = StatelessNoise(1).at(0, step.row_ids)
    drawn = build_sampler("uniform").sample(step, make_policy(catalog), reward, 4000, noise)
    for row in range(4):
        allowed = 8 - int(reward.result.excluded[row].sum())
        counts = torch.bincount(drawn.leaves[row], minlength=8)[~reward.result.excluded[row]]
        assert counts.min() > 0.8 * 4000 / allowed
        assert drawn.log_q[row].tolist() == pytest.approx([-math.log(allowed)] * 4000)


def test_the_column_history_is_needed():
    composite = CompositeReward(Table(values()), make_catalog(), exclude_history=True)
    with pytest.raises(ValueError, match="exclude_history needs the dataset column 'history'"):
        composite.of(make_step(without=("history",)))
