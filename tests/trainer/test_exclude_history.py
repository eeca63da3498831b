"""The trainer's option `exclude_history`."""

import logging

import pytest
import torch
from datasets import Dataset

from gflowtrl.data import count_repeats
from gflowtrl.rewards import CollaborativeReward
from gflowtrl.trainer import compare_with_rewards
from tests.trainer.world import ITEMS, make_rows, make_trainer, teacher


def repeating(count: int, repeats: int) -> Dataset:
    """`count` rows, of which `repeats` have a target that is in their history."""
    rows = make_rows(count)
    wanted = [history[0] if row < repeats else ITEMS[0] for row, history in enumerate(rows["history"])]
    histories = [
        history if row < repeats else [item for item in history if item != ITEMS[0]] or ITEMS[1:2]
        for row, history in enumerate(rows["history"])
    ]
    return Dataset.from_dict({"row_id": rows["row_id"], "history": histories, "target": wanted})


@pytest.mark.parametrize("repeats", [0, 1, 30])
def test_count_repeats(repeats):
    assert count_repeats(repeating(60, repeats)) == repeats
    doubled = Dataset.from_dict({"row_id": [1], "history": [["a", "b", "a"]], "target": ["a"]})
    assert count_repeats(doubled) == 1  # one row, though the item occurs twice


@pytest.mark.parametrize(
    ("setting", "repeats", "excludes"),
    [("no", 0, False), ("yes", 30, True), (True, 30, True), (False, 0, False), ("auto", 1, True), ("auto", 2, False)],
)
def test_auto_looks_at_the_training_rows(tmp_path, caplog, setting, repeats, excludes):
    rows = repeating(1500, repeats)
    with caplog.at_level(logging.INFO, logger="gflowtrl"):
        trainer = make_trainer(tmp_path, CollaborativeReward(teacher), exclude_history=setting, train_dataset=rows)
    assert trainer.rewards.exclude_history is excludes
    said = f"{repeats} of 1500 training targets"
    assert (said in caplog.text) == (setting == "auto")


def test_the_policy_leaves_items_of_the_history_out(tmp_path):
    """Exact flows reach R / Z over all leaves with the history excluded, and so does VarGrad nearly."""
    rows = make_rows(6, longest=3)
    options = dict(train_dataset=rows, exclude_history="yes", max_steps=150, per_device_train_batch_size=6)
    trainer = make_trainer(tmp_path, CollaborativeReward(teacher), loss_type="exact_flow", **options)
    trainer.train()
    distance = compare_with_rewards(
        trainer.policy_of(trainer.model.eval()), trainer.rewards, trainer._encoder, rows, progress=False
    )
    assert distance["total_variation"].max() < 0.05
    prompts = trainer._encoder(rows["history"])
    probabilities = trainer.policy_of(trainer.model).leaf_log_probs(prompts).exp()
    for row, history in enumerate(rows["history"]):
        alone = [item for item in history if len(trainer._catalog.items_of(trainer._catalog.leaf_of([item])[0])) == 1]
        assert probabilities[row, trainer._catalog.leaf_of(alone)].max() < 0.01


def test_the_share_that_was_drawn_is_logged(tmp_path):
    options = dict(exclude_history="yes", sampler="on_policy", num_generations=32, max_steps=1)
    trainer = make_trainer(tmp_path, CollaborativeReward(teacher), **options)
    trainer.train()
    logged = [entry["drawn_from_history"] for entry in trainer.state.log_history if "drawn_from_history" in entry]
    assert 0 < logged[0] < 0.5
    other = make_trainer(tmp_path, CollaborativeReward(teacher), exclude_history="yes", sampler="uniform", max_steps=1)
    other.train()
    assert other.state.log_history[0]["drawn_from_history"] == 0


def test_replayed_trajectories_are_not_items_of_the_history(tmp_path):
    options = dict(exclude_history="yes", sampler={"on_policy": 8, "replay": 8}, num_generations=16, max_steps=8)
    trainer = make_trainer(tmp_path, CollaborativeReward(teacher), train_dataset=make_rows(8), **options)
    trainer.train()
    state, rows = trainer.sampler.state_dict(), make_rows(8)
    histories = dict(zip(rows["row_id"], rows["history"], strict=True))
    for row_id, leaves in zip(state["replay/row_ids"].tolist(), state["replay/leaves"], strict=True):
        for leaf in leaves[leaves >= 0].tolist():
            assert not set(trainer._catalog.items_of(leaf)) <= set(histories[row_id])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude_history": "yes", "reward_floor": 0.0}, "exclude_history is 'yes' and reward_floor is 0"),
        ({"exclude_history": "auto", "reward_floor": 0.0}, "Set reward_floor to 1e-3"),
        ({"exclude_history": "maybe"}, "exclude_history"),
        ({"exclude_history": "yes", "loss_type": "sft"}, "no loss of \\['sft'\\] balances rewards"),
    ],
)
def test_bad_settings(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, CollaborativeReward(teacher), **options)


def test_no_floor_with_exact_flows(tmp_path):
    options = dict(exclude_history="yes", reward_floor=0.0, loss_type="exact_flow")
    trainer = make_trainer(tmp_path, CollaborativeReward(teacher), **options)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
