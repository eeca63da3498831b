"""Weights learned from held-out positives, compared with a grid search over all shares."""

import itertools
import math

import pytest
import torch
from datasets import Dataset

from gflowtrl.data import PromptEncoder, Step
from gflowtrl.rewards import (
    CollaborativeReward,
    CompositeReward,
    GroundTruthReward,
    InteractionReward,
    LikelihoodReward,
    Reward,
    TokenSimilarityReward,
    fit_reward_weights,
    one_step_back,
)
from tests.rewards.world import SEMANTIC_IDS, TOKENIZER, TableTeacher, make_catalog, make_policy


ITEMS = list(SEMANTIC_IDS)


class Table:
    """Values of all items, given the last item of the history."""

    def __init__(self, seed, normalized=True, power=3.0):
        table = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed)) ** power
        self.table = table / table.sum(1, keepdim=True) if normalized else table
        self.seen_columns = []

    def score_items(self, step):
        self.seen_columns.append(set(step.columns))
        return self.table[[ITEMS.index(history[-1]) for history in step.columns["history"]]]


def rows(targets, count=60) -> Dataset:
    """Make rows with a history of two items. `targets(last item, row)` draws the target."""
    histories = [[ITEMS[i % 7], ITEMS[i % 9]] for i in range(count)]
    return Dataset.from_dict({
        "row_id": list(range(count)),
        "history": histories,
        "target": [targets(history[-1], i) for i, history in enumerate(histories)],
        "session_items": [["fig"]] * count,
        "session_levels": [[1]] * count,
    })  # fmt: skip


def drawn_from(table):
    generator = torch.Generator().manual_seed(9)
    return lambda last, i: ITEMS[int(torch.multinomial(table[ITEMS.index(last)], 1, generator=generator))]


def fit(rewards, data, **options):
    catalog = make_catalog()
    return fit_reward_weights(rewards, catalog, data, PromptEncoder(catalog, TOKENIZER), **options)


def objective(rewards, data, floor=1e-3, column="target"):
    """Return the objective, a function of the weights: the mean log of R(held-out) / Z, computed row by row."""
    catalog, rows_of_parts = make_catalog(), []
    for row in data:
        columns = {name: [row[name]] for name in ("history", "target")}
        step = Step({}, torch.zeros(1, dtype=torch.long), catalog.leaf_of(columns["target"]), columns)
        parts = CompositeReward(rewards, catalog, transform="exp").dense(step).result.parts.values()
        leaf = int(catalog.leaf_of([row[column]]))
        rows_of_parts.append([(float(part[0, leaf] + floor * part.mean()), float(part.sum())) for part in parts])

    def mean(weights):
        logs = []
        for row in rows_of_parts:
            r = sum(w * value for w, (value, _) in zip(weights, row, strict=True))
            logs.append(math.log(r / sum(w * total for w, (_, total) in zip(weights, row, strict=True))))
        return sum(logs) / len(logs)

    return mean


@pytest.mark.parametrize("normalized", [True, False])
def test_no_grid_point_is_better(normalized):
    """Three rewards with all shares in steps of 0.1, with equal and with different totals per row."""
    rewards = [Table(seed, normalized) for seed in (1, 2, 3)]
    mixture = 0.6 * rewards[0].table + 0.4 * rewards[2].table
    data = rows(drawn_from(mixture), 40)
    learned = fit(rewards, data, batch_size=7)
    assert sum(learned.shares) == pytest.approx(1) and min(learned.weights) > 0
    likelihood = objective(rewards, data)
    assert likelihood(learned.weights) == pytest.approx(learned.log_likelihood, abs=1e-5)
    scale = [weight / share for weight, share in zip(learned.weights, learned.shares, strict=True)]
    grid = [(a / 10, b / 10, (10 - a - b) / 10) for a, b in itertools.product(range(11), repeat=2) if a + b <= 10]
    values = [likelihood([share * s for share, s in zip(shares, scale, strict=True)]) for shares in grid]
    assert max(values) <= learned.log_likelihood + 1e-6
    assert max(values) > learned.log_likelihood - 0.02  # the grid contains a point close to the maximum
    best = grid[max(range(len(values)), key=values.__getitem__)]
    assert max(abs(a - b) for a, b in zip(best, learned.shares, strict=True)) < 0.15
    equal = likelihood([s / 3 for s in scale])
    assert equal == pytest.approx(learned.equal_log_likelihood, abs=1e-5) and equal < learned.log_likelihood


def test_many_draws_recover_the_shares_of_the_mixture():
    rewards = [Table(1), Table(2)]
    learned = fit(rewards, rows(drawn_from(0.7 * rewards[0].table + 0.3 * rewards[1].table), 3000), batch_size=500)
    assert learned.shares == pytest.approx([0.7, 0.3], abs=0.06)
    again = fit(rewards, rows(drawn_from(0.7 * rewards[0].table + 0.3 * rewards[1].table), 3000), batch_size=200)
    assert again.shares == pytest.approx(learned.shares, abs=1e-5)


def test_the_scale_of_a_reward_does_not_matter():
    """The weight compensates for the scale: the mean total reward of a prompt is 1."""
    rewards, larger = [Table(1), Table(2)], [Table(1), Table(2)]
    larger[1].table = 50 * larger[1].table
    data = rows(drawn_from(rewards[0].table + rewards[1].table))
    one, other = fit(rewards, data), fit(larger, data)
    assert other.shares == pytest.approx(one.shares, abs=1e-6)
    assert other.weights == pytest.approx([one.weights[0], one.weights[1] / 50], rel=1e-4)
    assert sum(one.weights) == pytest.approx(1)  # all totals are 1


def test_rewards_do_not_see_the_held_out_positives():
    catalog, table = make_catalog(), Table(1)
    data = rows(drawn_from(table.table))
    fit([table, CollaborativeReward(TableTeacher()), LikelihoodReward(make_policy(catalog))], data.select(range(9)))
    assert set.union(*table.seen_columns) == {"row_id", "history"}
    for reward, column in ((GroundTruthReward(), "target"), (InteractionReward(), "session_items")):
        with pytest.raises(ValueError, match=f"needs the dataset column '{column}'") as caught:
            fit([table, reward], data)
        assert "hides the held-out positive" in caught.value.__notes__[0]


def test_rewards_that_read_the_target_are_judged_by_the_next_item():
    """Each target is similar but not equal to the item before it, so similarity gets a large share."""
    catalog = make_catalog()
    near = {"apple": "fig", "fig": "apple", "lime": "kiwi", "kiwi": "lime", "date": "nut", "nut": "date"}
    data = rows(lambda last, i: near.get(last, "plum"))
    shifted = one_step_back(data)
    assert shifted.column_names == ["row_id", "history", "target", "next"]
    assert shifted[0] == {
        "row_id": 0, "history": data[0]["history"][:1], "target": data[0]["history"][1], "next": data[0]["target"]
    }  # fmt: skip
    rewards = [GroundTruthReward(), TokenSimilarityReward(prefix=True), Table(4)]
    learned = fit(rewards, shifted, held_out="next")
    assert learned.shares[0] < 1e-3 and learned.shares[1] > learned.shares[2]
    likelihood = objective(rewards, shifted, column="next")(learned.weights)
    assert likelihood == pytest.approx(learned.log_likelihood, abs=1e-5)
    short = Dataset.from_dict({"row_id": [1], "history": [["fig"]], "target": ["nut"]})
    assert len(one_step_back(short)) == 0
    assert catalog.items == ITEMS


class Constant:
    def __init__(self, value):
        self.value = value

    def score_items(self, step):
        return torch.full((len(step), 9), self.value)


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([Table(1), Constant(0.0)], {}, "'Constant' is 0 for every item of every row"),
        ([Table(1), Constant(-1.0)], {}, "'Constant' has negative values"),
        ([Table(1), lambda **_: []], {"tokenizer": TOKENIZER}, "cannot score all items"),
        ([Table(1), LikelihoodReward()], {}, "'likelihood' cannot score all items"),
        ([Table(1)], {"held_out": "next"}, "held_out is 'next'; it must be a column of the rows"),
        ([Table(1)], {"floor": 0.0}, r"floor is 0.0; it must be a number in \(0, 1\)"),
    ],
)
def test_invalid_options_raise_errors(rewards, options, message):
    with pytest.raises(ValueError, match=message):
        fit(rewards, rows(lambda last, i: "fig"), **options)


def test_rows_without_information():
    with pytest.raises(ValueError, match="rows is empty"):
        fit([Table(1)], rows(lambda last, i: "fig").select([]))
    ones = Table(1)
    ones.table = torch.eye(9)
    with pytest.raises(ValueError, match="All rewards are 0 for all held-out positives"):
        fit([ones], rows(lambda last, i: ITEMS[ITEMS.index(last) - 1] if last != "quince" else "fig"))
    ones.table[3] = 0
    with pytest.raises(ValueError, match="All rewards are 0 for every item of row 3"):
        fit([ones], rows(lambda last, i: "fig"))


def test_targets_are_hidden_only_if_they_are_held_out():
    """A reward can read `target_leaves` if another positive is held out."""
    target_leaves = []

    class Reads(Reward):
        def score_items(self, step):
            target_leaves.append(step.target_leaves.clone())
            return torch.ones(len(step), 9) / 9

    catalog = make_catalog()
    data = Dataset.from_dict({"row_id": [1], "history": [["fig", "pear"]], "target": ["apple"]})
    encoder = PromptEncoder(catalog, TOKENIZER)
    fit_reward_weights(Reads("reads"), catalog, data, encoder)
    fit_reward_weights(Reads("reads"), catalog, one_step_back(data), encoder, held_out="next")
    assert target_leaves[0].tolist() == [-1] and target_leaves[1].tolist() == catalog.leaf_of(["pear"]).tolist()
