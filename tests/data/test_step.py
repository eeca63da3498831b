"""Steps: columns with any name, memoized results, slices, and the columns that reach rewards and samplers."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from gflowtrl.data import GroupCollator, PromptEncoder, Step, check_column_names
from gflowtrl.data.step import REWARD_ARGUMENTS
from gflowtrl.rewards import CompositeReward, GroundTruthReward
from gflowtrl.samplers import Sampler, Trajectories
from tests.rewards.world import SEMANTIC_IDS, TOKENIZER, make_step
from tests.rewards.world import make_catalog as make_small_catalog
from tests.trainer.world import losses, make_rows, make_trainer


#: Names that the library uses internally, all allowed as names of dataset columns.
ANY_NAME = (
    "progress", "policy", "cache", "input_ids", "attention_mask", "target_leaf", "target_leaves", "policy_leaves",
    "policy_log_probs", "leaf_log_rewards", "row_ids", "columns", "members", "labels", "length", "step", "reward",
    "leaves", "noise", "num_generations", "name", "function",
)  # fmt: skip


def collate(rows):
    return GroupCollator(PromptEncoder(make_small_catalog(), TOKENIZER))(rows)


def some_rows(**more):
    rows = [
        {"row_id": 7, "history": ["fig"], "target": "date"},
        {"row_id": 2**40, "history": ["nut"], "target": "nut"},
    ]
    return [{**row, **more} for row in rows]


# ---------------------------------------------------------------------------------------------------------------- once
def test_once_computes_once_per_owner_and_name():
    step, calls = make_step(), []

    def compute(value):
        calls.append(value)
        return value

    owner, equal = ["the same"], ["the same"]
    assert [step.once(owner, "scores", lambda: compute(1)), step.once(owner, "scores", lambda: compute(2))] == [1, 1]
    assert step.once(owner, "flows", lambda: compute(3)) == 3
    assert step.once(equal, "scores", lambda: compute(4)) == 4  # owners are compared by identity, not by value
    assert [step.once(owner, "none", lambda: compute(None)) for _ in range(2)] == [None, None]
    assert calls == [1, 3, 4, None]
    assert make_step().once(owner, "scores", lambda: compute(5)) == 5  # every step has its own results


def test_an_error_is_not_memoized():
    step = make_step()
    with pytest.raises(ZeroDivisionError):
        step.once(step, "x", lambda: 1 / 0)
    assert step.once(step, "x", lambda: 1) == 1


def test_owners_live_as_long_as_the_step():
    """Otherwise Python could reuse the identity of an owner for the next object."""

    class Owner:
        pass

    step, alive = make_step(), []
    for number in range(50):
        owner = Owner()
        alive.append(weakref.ref(owner))
        assert step.once(owner, "x", lambda: number) == number  # noqa: B023
        del owner
    gc.collect()
    assert all(reference() is not None for reference in alive)
    del step
    gc.collect()
    assert all(reference() is None for reference in alive)


def test_a_changed_copy_has_an_empty_memo():
    step = make_step()
    assert step.once(step.columns, "target", lambda: step.target_leaves.tolist()) == step.target_leaves.tolist()
    hidden = replace(step, target_leaves=torch.full((4,), -1))
    assert hidden.once(step.columns, "target", lambda: hidden.target_leaves.tolist()) == [-1] * 4
    assert hidden.columns is step.columns and hidden.prompts is step.prompts


# ---------------------------------------------------------------------------------------------------- columns and rows
def test_the_error_of_a_missing_column_lists_the_existing_ones():
    step = make_step(without=("session_items", "session_levels", "budget"))
    assert step.column("history", "Reward 'x'") is step.columns["history"]
    message = r"Reward 'x' needs the dataset column 'price'; the rows have \['history', 'row_id', 'target'\]"
    with pytest.raises(ValueError, match=message):
        step.column("price", "Reward 'x'")


def test_rows_are_a_step_with_its_own_memo():
    step = make_step(progress=0.25)
    step.once(step, "x", lambda: "of all rows")
    part = step.rows(slice(1, 3))
    assert len(part) == 2 and len(step) == 4 and part.progress == 0.25 and part.device == step.device
    assert part.row_ids.tolist() == [11, 12] and torch.equal(part.target_leaves, step.target_leaves[1:3])
    assert part.columns == {name: values[1:3] for name, values in step.columns.items()}
    assert part.prompts.keys() == {"input_ids", "attention_mask"}
    assert all(torch.equal(part.prompts[name], step.prompts[name][1:3]) for name in part.prompts)
    assert part.once(step, "x", lambda: "of two") == "of two"


def test_from_batch():
    batch, catalog = collate(some_rows(price=1.5)), make_small_catalog()
    step = Step.from_batch(batch, catalog, 0.5)
    assert step.prompts is batch["prompts"] and step.columns is batch["rows"].columns and step.progress == 0.5
    assert step.row_ids.tolist() == [7, 2**40]
    assert [catalog.items_of(leaf) for leaf in step.target_leaves.tolist()] == [["date"], ["nut"]]
    assert step.columns == {
        "row_id": [7, 2**40], "history": [["fig"], ["nut"]], "target": ["date", "nut"], "price": [1.5, 1.5],
    }  # fmt: skip
    assert Step.from_batch(batch, catalog).progress == 0.0
    with pytest.raises(ValueError, match="'melon' is not in the catalog"):
        Step.from_batch(collate(some_rows(target="melon")), catalog)


@pytest.mark.parametrize("name", REWARD_ARGUMENTS)
def test_names_of_reward_arguments_are_refused(name, tmp_path):
    message = f"column '{name}' has the name of an argument.*rename_column.'{name}', 'my_{name}'"
    with pytest.raises(ValueError, match=message):
        check_column_names(["row_id", name])
    batch = collate(some_rows(**{name: 1}))  # the collator allows the name; calling a reward with it does not
    plain = CompositeReward(lambda **columns: [1.0] * 2, make_small_catalog(), TOKENIZER)
    with pytest.raises(ValueError, match=message):
        plain.of(Step.from_batch(batch, make_small_catalog())).log(torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, [GroundTruthReward()], train_dataset=make_rows().add_column(name, [7] * 24))


def test_every_other_name_is_allowed():
    check_column_names(["row_id", "history", "target", *ANY_NAME])
    batch = collate(some_rows(**dict.fromkeys(ANY_NAME, "x")))
    step = Step.from_batch(batch, make_small_catalog())
    assert all(step.column(name, "This test") == ["x", "x"] for name in ANY_NAME)
    expected = PromptEncoder(make_small_catalog(), TOKENIZER)([["fig"], ["nut"]])
    assert all(torch.equal(step.prompts[name], expected[name]) for name in expected)
    assert set(SEMANTIC_IDS).issuperset(step.columns["target"])


# -------------------------------------------------------------------------------------------------- in a real training
class Listener(Sampler):
    """Samples uniform leaves and records the steps of all calls."""

    def __init__(self):
        self.steps = []

    def sample(self, step, policy, reward, num_generations, noise):
        self.steps.append(step)
        size = policy.catalog.tree.num_leaves
        return Trajectories.of_one_source((noise.uniform("listener", num_generations) * size).long())

    def observe(self, step, trajectories, feedback):
        self.steps.append(step)


class TensorReward:
    """Reward on tensors that records its steps."""

    def __init__(self, items):
        self.items, self.steps = items, []

    def score_items(self, step):
        self.steps.append(step)
        return torch.ones(len(step), self.items)


def test_columns_of_every_name_reach_rewards_and_samplers(tmp_path):
    """They arrive unchanged, with the right row, and do not change the training."""

    def value(name, row_id):
        return f"{name} of {row_id}"

    called = []

    def plain(items, row_id, **columns):
        called.append((row_id, columns))
        return [1.0 + (int(number) % 3) for number in row_id]

    def train(folder, names):
        rows, listener = make_rows(), Listener()
        for name in names:
            rows = rows.add_column(name, [value(name, row_id) for row_id in rows["row_id"]])
        tensor = TensorReward(24)
        trainer = make_trainer(
            tmp_path / folder, [plain, tensor], train_dataset=rows, sampler=listener, loss_type="vargrad", max_steps=2
        )
        trainer.train()
        return trainer, listener.steps + tensor.steps

    bare, _ = train("bare", ())
    called.clear()
    trainer, steps = train("named", ANY_NAME)
    assert losses(trainer) == losses(bare)
    assert len(called) == 2 and len(steps) >= 6
    for row_ids, columns in called:
        assert len(row_ids) == 8 * 4
        for name in ANY_NAME:
            assert columns[name] == [value(name, row_id) for row_id in row_ids], name
    for step in steps:
        for name in ANY_NAME:
            assert step.columns[name] == [value(name, row_id) for row_id in step.row_ids.tolist()], name
    assert {step.progress for step in steps} == {0.0, 0.5}
