"""Combination of rewards: sum, transforms, floor and errors, compared with values computed by hand."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowtrl.policy import StatelessNoise
from gflowtrl.rewards import (
    CollaborativeReward,
    CompositeReward,
    DenseReward,
    GroundTruthReward,
    PosteriorReward,
    SampledReward,
)
from tests.rewards.world import PRICES, TOKENIZER, TableTeacher, all_leaves, make_catalog, make_step


class Fixed:
    """A reward with a fixed table of items or leaves."""

    def __init__(self, items=None, leaves=None):
        self.calls = 0
        if items is not None:
            self.score_items = lambda step: self._count(items)
        if leaves is not None:
            self.score_leaves = lambda step, drawn: self._count(leaves).gather(1, drawn)

    def _count(self, values):
        self.calls += 1
        return values


def over_leaves(values, **options):
    """Make one reward with these values at the 8 leaves, known for all leaves. The second item of a leaf gets 0."""
    catalog = make_catalog()
    items = torch.zeros(len(values), len(catalog))
    for leaf in range(catalog.tree.num_leaves):
        items[:, catalog.items.index(catalog.items_of(leaf)[0])] = torch.as_tensor(values)[:, leaf]
    return CompositeReward(Fixed(items=items), catalog, **options)


TABLE = [[0, 0, 0, 0, 0, 0, 2, 6], [1, 1, 1, 1, 1, 1, 1, 9], [5, 0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]]
TABLE = torch.tensor(TABLE, dtype=torch.float32)


def test_power_with_floor_by_hand():
    step = make_step()
    composite = over_leaves(TABLE, beta=2.0, floor=0.25, weights=[3.0])
    result = composite.of(step).score(torch.tensor([[0, 6, 7], [0, 1, 7], [0, 1, 2], [0, 1, 2]]))
    # The means of 3 r over the leaves are 3, 6, 15/8 and 13.5. The floors are a quarter of the means.
    floored = [[0.75, 6, 18], [3, 3, 27], [15, 15 / 32, 15 / 32], [3.375, 6, 9]]
    torch.testing.assert_close(result.log_rewards, 2 * torch.tensor(floored).log())
    assert result.rewards.tolist() == [[0, 6, 18], [3, 3, 27], [15, 0, 0], [3, 6, 9]]
    assert result.parts["Fixed"].tolist() == [[0, 2, 6], [1, 1, 9], [5, 0, 0], [1, 2, 3]]
    low = [6 * 0.75**2 / (6 * 0.75**2 + 36 + 324), 0, 7 * (15 / 32) ** 2 / (7 * (15 / 32) ** 2 + 225)]
    low.append(3.375**2 / (3.375**2 + 9 * sum(i * i for i in range(2, 9))))
    assert float(result.floored_mass) == pytest.approx(sum(low) / 4, rel=1e-5)


def test_max_elements_limits_the_table():
    catalog, step = make_catalog(), make_step()
    leaves = torch.tensor([[0, 6], [1, 7], [0, 2], [3, 3]])

    def composite(max_elements, rows=4):
        reward = Fixed(items=torch.rand(rows, len(catalog), generator=torch.Generator().manual_seed(0)))
        reward.score_leaves = lambda step, drawn: catalog.fold_items(reward.score_items(step)).gather(1, drawn)
        return CompositeReward(reward, catalog, transform="exp", max_elements=max_elements)

    small, large = composite(31), composite(32)  # 4 prompts x 8 leaves
    assert isinstance(small.of(step), SampledReward) and isinstance(large.of(step), DenseReward)
    assert isinstance(composite(31, 3).of(make_step((0, 1, 2))), DenseReward)
    assert isinstance(composite(7, 1).of(make_step((0,))), SampledReward)  # even a single row can be too large
    torch.testing.assert_close(small.of(step).log(leaves), large.of(step).log(leaves))
    assert small.dense(step) is small.dense(step) and small.dense(step) is not large.dense(step)


def test_flows_and_draws_need_every_leaf():
    reward = CompositeReward(Fixed(leaves=TABLE + 1), make_catalog()).of(make_step())
    with pytest.raises(ValueError, match="flows of nodes need the reward of every leaf.*score_items"):
        reward.log_flows(torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="RewardSampler needs the rewards of all leaves"):
        reward.sample(2, StatelessNoise(0).at(0, make_step().row_ids))


def test_a_prior_is_added_to_log_r():
    """A prior of all leaves also affects flows and draws. A prior of drawn leaves affects only their rewards."""
    step, leaves = make_step(), torch.tensor([[7, 0], [1, 1], [3, 2], [5, 6]])
    dense, log_prior = over_leaves(TABLE + 1).dense(step), torch.randn(4, 8).log_softmax(1)
    posterior = dense.with_prior(log_prior)
    expected = dense.result.log_rewards + log_prior
    root = torch.zeros(4, 1, dtype=torch.long)
    torch.testing.assert_close(posterior.log_flows(root)[:, 0], expected.logsumexp(1))
    sampled_posterior = PosteriorReward(dense, lambda drawn: log_prior.gather(1, drawn))
    for reward in (posterior, sampled_posterior):
        torch.testing.assert_close(reward.log(leaves), expected.gather(1, leaves))
        torch.testing.assert_close(reward.score(leaves).log_prior, log_prior.gather(1, leaves))
    noise = StatelessNoise(0).at(0, step.row_ids)
    for reward, target in ((posterior, expected), (sampled_posterior, dense.result.log_rewards)):
        sampled, log_q = reward.sample(4, noise)
        torch.testing.assert_close(log_q, target.log_softmax(1).gather(1, sampled))


def test_exp_allows_any_sign():
    composite = over_leaves(TABLE - 4, transform="exp", beta=0.5)
    torch.testing.assert_close(composite.dense(make_step()).result.log_rewards, 0.5 * (TABLE - 4))
    assert float(composite.dense(make_step()).result.floored_mass) == 0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1e6), min_size=8, max_size=8).filter(any), min_size=4, max_size=4),
    st.floats(1e-6, 0.9),
)
def test_floored_mass_is_at_most_the_floor(values, floor):
    result = over_leaves(torch.tensor(values) + 1e-30, floor=floor).dense(make_step()).result
    assert torch.isfinite(result.log_rewards).all()
    assert float(result.floored_mass) <= floor + 1e-5


def test_all_leaves_are_scored_once_and_gathered():
    catalog, step = make_catalog(), make_step()
    counted = Fixed(items=torch.rand(4, 9))
    rewards = [GroundTruthReward(), CollaborativeReward(TableTeacher()), counted]
    composite = CompositeReward(rewards, catalog, weights=[0.3, 0.7, 0.1])
    table, leaves = composite.dense(step).result.log_rewards, torch.tensor([[7, 0], [1, 1], [3, 2], [5, 6]])
    result = composite.of(step).score(leaves)
    assert composite.can_score_all and counted.calls == 1
    assert composite.names == list(result.parts) == ["ground_truth", "collaborative", "Fixed"]
    assert torch.equal(result.log_rewards, table.gather(1, leaves))
    weighted = sum(w * result.parts[name] for w, name in zip([0.3, 0.7, 0.1], composite.names, strict=True))
    torch.testing.assert_close(result.rewards, weighted)
    # Scaling all weights shifts log R by a constant, including the floor.
    scaled = CompositeReward(rewards, catalog, weights=[3.0, 7.0, 1.0]).dense(make_step()).result.log_rewards
    torch.testing.assert_close(scaled, table + math.log(10))


def test_leaf_reduction_of_a_collision():
    catalog = make_catalog()
    items = torch.rand(4, 9) + 0.5
    leaf, pair = catalog.leaf_of(["apple"]), items[:, catalog.index_of(["apple", "quince"])]
    for reduction, expected in (("sum", pair.sum(1)), ("max", pair.amax(1))):
        composite = CompositeReward(Fixed(items=items), catalog, leaf_reduction=reduction)
        torch.testing.assert_close(composite.dense(make_step()).result.rewards[:, leaf].squeeze(1), expected)


def test_group_floor_uses_distinct_leaves():
    """If not all leaves are known, a leaf that is drawn twice counts once."""
    composite = CompositeReward(Fixed(leaves=TABLE), make_catalog(), floor=0.5)
    assert not composite.can_score_all
    result = composite.of(make_step()).score(torch.tensor([[7, 7, 7, 6, 0], [7] * 5, [0] * 5, [7] * 5]))
    floor = 0.5 * (6 + 2 + 0) / 3
    assert result.log_rewards[0].exp().tolist() == pytest.approx([6, 6, 6, 2, floor])
    assert float(result.floored_mass) == pytest.approx(floor / (6 + 2 + floor) / 4)  # nothing in the other three rows


def test_mixed_kinds_agree_with_all_tensors():
    """A list, scores of leaves and scores of items give the result of three scores of items, except for the floor."""
    catalog, leaves = make_catalog(), torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]] * 4)
    ground, collaborative, prices = GroundTruthReward(), CollaborativeReward(TableTeacher()), torch.rand(4, 9)
    leaf_prices = catalog.fold_items(prices)

    def listed(items, budget, **_):
        pairs = zip(budget, items, strict=True)
        return [sum(prices[int(row), catalog.items.index(item)].item() for item in group) for row, group in pairs]

    fast = CompositeReward([ground, collaborative, Fixed(items=prices)], catalog, weights=[1, 2, 3])
    expected = fast.of(make_step()).log(leaves)
    for third in (listed, Fixed(leaves=leaf_prices)):
        slow = CompositeReward([ground, collaborative, third], catalog, TOKENIZER, weights=[1, 2, 3])
        torch.testing.assert_close(slow.of(make_step()).log(leaves), expected)


def test_one_synchronization_per_batch(monkeypatch):
    """Reading a value synchronizes the accelerator. All checks together read a single value."""
    composite, step, reads = over_leaves(TABLE + 1), make_step(), []
    for name in ("__bool__", "item", "tolist", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, original=original, name=name: reads.append(name) or original(self)
        )
    composite.of(step).score(torch.zeros(4, 2, dtype=torch.long))
    assert reads == ["__bool__"]


def test_names():
    def cheap(**_):
        return []

    rewards = [cheap, functools.partial(cheap), Fixed(leaves=TABLE), Fixed(leaves=TABLE), GroundTruthReward()]
    names = CompositeReward(rewards, make_catalog(), TOKENIZER).names
    assert names == ["cheap", "cheap_2", "Fixed", "Fixed_2", "ground_truth"]


# ------------------------------------------------------------------------------------------------------------- errors
LEAVES = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])


def broken_reward(kind, value, row=2, column=1):
    """Make a reward of any kind with one invalid value, at the leaf of row 2 and column 1 (leaf 5)."""
    catalog, leaf = make_catalog(), int(LEAVES[row, column])
    if kind == "list":
        values = [1.0] * 8
        values[row * 2 + column] = value

        def broken(**_):
            return values

        return broken
    values = torch.ones(4, 9 if kind == "items" else 8)
    values[row, catalog.items.index(catalog.items_of(leaf)[0]) if kind == "items" else leaf] = value
    broken = Fixed(**{kind: values})
    broken.__name__ = "broken"
    return broken


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5])
@pytest.mark.parametrize("kind", ["list", "leaves", "items"])
def test_an_invalid_value_is_named_with_its_reward_and_row(kind, value):
    composite = CompositeReward([GroundTruthReward(), broken_reward(kind, value)], make_catalog(), TOKENIZER)
    item = make_catalog().items_of(5)[0]
    with pytest.raises(
        ValueError, match=rf"'broken' returned {value} for row 2 of the batch \(row_id 12\), item '{item}'"
    ):
        composite.of(make_step()).score(LEAVES)


def test_negative_values_are_allowed_with_exp_and_with_weight_zero():
    step, catalog = make_step(), make_catalog()
    exp = CompositeReward(broken_reward("list", -0.5), catalog, TOKENIZER, transform="exp")
    assert exp.of(step).log(LEAVES)[2, 1] == -0.5
    rewards = [broken_reward("list", 1), broken_reward("list", -0.5)]
    logged = CompositeReward(rewards, catalog, TOKENIZER, weights=[1, 0])
    assert logged.of(step).score(LEAVES).parts["broken_2"][2, 1] == -0.5


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0] * 7, ValueError, "'broken' returned 7 values for 8 completions"),
        (1.0, TypeError, "'broken' returned float; it must return a list of 8 numbers"),
        ([1.0, "good"] + [1.0] * 6, TypeError, "'broken' returned 'good' for row 0 of the batch"),
    ],
)
def test_invalid_list(values, error, message):
    def broken(**_):
        return values

    with pytest.raises(error, match=message):
        CompositeReward(broken, make_catalog(), TOKENIZER).of(make_step()).score(LEAVES)


@pytest.mark.parametrize("kind", ["items", "leaves"])
def test_invalid_shape(kind):
    broken = Fixed(**{kind: torch.ones(4, 9)})
    broken.score_leaves = lambda step, leaves: torch.ones(4)
    if kind == "items":
        broken.score_items = lambda step: torch.ones(4, 8)
    shapes = r"\(4, 8\); it must return a tensor of shape \(4, 9\)" if kind == "items" else r"\(4,\).*\(4, 2\)"
    with pytest.raises(ValueError, match=f"score_{kind} of reward 'Fixed' returned a tensor of shape {shapes}"):
        CompositeReward(broken, make_catalog()).of(make_step()).score(LEAVES)


@pytest.mark.parametrize("kind", ["items", "leaves"])
def test_row_without_reward(kind):
    values = torch.ones(4, 9 if kind == "items" else 8)
    values[1] = 0
    composite = CompositeReward(Fixed(**{kind: values}), make_catalog())
    with pytest.raises(ValueError, match=r"row 1 of the batch \(row_id 11\).* All other rewards of this row are zero"):
        composite.of(make_step()).score(LEAVES)
    values[1, 1:] = 1
    with pytest.raises(ValueError, match=r"row 1 of the batch .* reward_floor is 0. Set it to 1e-3"):
        CompositeReward(Fixed(**{kind: values}), make_catalog(), floor=0.0).of(make_step()).score(LEAVES * 0)


def test_none_is_skipped_unless_all_are_none():
    def sometimes(budget, **_):
        return [None if b == 2 else 5.0 for b in budget]

    catalog = make_catalog()
    both = CompositeReward([sometimes, Fixed(leaves=TABLE + 1)], catalog, TOKENIZER, weights=[2, 1])
    result = both.of(make_step()).score(LEAVES)
    assert result.rewards[2].tolist() == [1, 1] and result.rewards[0].tolist() == [11, 11]
    assert result.parts["sometimes"].isnan().tolist() == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]
    with pytest.raises(ValueError, match=r"All rewards are None for row 2 of the batch \(row_id 12\)"):
        CompositeReward(sometimes, catalog, TOKENIZER).of(make_step()).score(LEAVES)


def test_plain_callable_cannot_score_all():
    def cheap(**_):
        return []

    composite = CompositeReward([GroundTruthReward(), cheap], make_catalog(), TOKENIZER)
    with pytest.raises(ValueError, match=r"'cheap' cannot score all items. Give it a method score_items"):
        composite.dense(make_step())
    with pytest.raises(ValueError, match="'cheap' is a plain callable, which is called with text; pass a tokenizer"):
        CompositeReward(cheap, make_catalog())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, 2.0]}, "2 reward_weights were given for 1 rewards"),
        ({"weights": [0.0]}, "not all zero"),
        ({"weights": [-1.0]}, "with reward_transform='power' the weights must be >= 0"),
        ({"transform": "log"}, "reward_transform is 'log'"),
        ({"beta": 0}, "reward_beta is 0.*; it must be a finite number above 0"),
        ({"floor": 1.0}, r"reward_floor is 1.0; it must be a number in \[0, 1\)"),
        ({"leaf_reduction": "mean"}, "leaf_reduction is 'mean'"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        CompositeReward(GroundTruthReward(), make_catalog(), **options)


def test_empty_and_invalid_reward_funcs():
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        CompositeReward([], make_catalog())
    with pytest.raises(TypeError, match="reward_funcs contains 'accuracy'; a reward must be callable"):
        CompositeReward("accuracy", make_catalog())


def test_a_custom_reward_moves_the_target_distribution():
    catalog, step = make_catalog(), make_step()

    def prefer_cheap(items, **_):
        return [1 / min(PRICES[item] for item in group) for group in items]

    def expected_price(rewards):
        leaves = all_leaves(catalog, step)
        log_rewards = CompositeReward(rewards, catalog, TOKENIZER).of(make_step()).log(leaves)
        price = torch.tensor([min(PRICES[item] for item in catalog.items_of(leaf)) for leaf in range(8)])
        return (log_rewards.softmax(1) * price).sum(1).mean()

    teacher = CollaborativeReward(TableTeacher())
    assert expected_price([teacher, prefer_cheap]) < expected_price([teacher]) - 0.5


def test_a_wrapper_with_forwarded_methods_is_a_reward():
    class Wrapper:
        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            return getattr(self._inner, name)

    plain, wrapped = (CompositeReward(r, make_catalog()) for r in (GroundTruthReward(), Wrapper(GroundTruthReward())))
    assert wrapped.can_score_all
    assert torch.equal(*(composite.dense(make_step()).result.rewards for composite in (plain, wrapped)))


def test_a_reward_that_reads_the_policy_scores_drawn_leaves_only():
    reward = Fixed(items=TABLE, leaves=TABLE)
    reward.reads_policy = True
    assert CompositeReward(reward, make_catalog()).sampled_only == ["Fixed"]


def test_errors_of_unknown_flows_state_the_reason():
    composite = CompositeReward(GroundTruthReward(), make_catalog(), max_elements=8)
    with pytest.raises(ValueError, match="larger than max_exact_elements=8: raise it"):
        composite.of(make_step()).log_flows(torch.zeros(4, 1, dtype=torch.long))
    prior = PosteriorReward(composite.dense(make_step()), torch.zeros_like)
    with pytest.raises(ValueError, match="with ref_weight the reference model scores drawn leaves only"):
        prior.log_flows(torch.zeros(4, 1, dtype=torch.long))
