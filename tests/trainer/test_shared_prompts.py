"""Rows of one user on one prompt: the same training, fewer tokens."""

import pytest
import torch
from datasets import Dataset

from gflowtrl.rewards import CollaborativeReward, GroundTruthReward, LikelihoodReward

from .world import ITEMS, losses, make_rows, make_trainer, teacher, weights


@pytest.fixture
def user_rows() -> Dataset:
    """Five users, a row for each item after the first; one history is longer than a prompt may be."""
    rows = []
    for user, length in enumerate((3, 5, 2, 9, 4)):
        items = [ITEMS[(7 * user + 3 * place) % len(ITEMS)] for place in range(length)]
        rows += [{"history": items[:end], "target": items[end]} for end in range(1, length)]
    return Dataset.from_list([{"row_id": 10 + number, **row} for number, row in enumerate(rows)])


def run(tmp_path, rows, shared: int, **options):
    trainer = make_trainer(
        tmp_path, [GroundTruthReward(), CollaborativeReward(teacher)], max_shared_prompts=shared, train_dataset=rows,
        max_history_items=5, optim="sgd", learning_rate=0.1, max_steps=4, **options,
    )  # fmt: skip
    trainer.policy_of(trainer.model)  # the first time it is compared with the model
    lengths = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.train()
    return trainer, sum(lengths)


@pytest.mark.parametrize("loss_type", ["exact_flow", "sft,detailed_balance", "vargrad", "trajectory_balance"])
def test_training_is_the_same_for_the_same_batches(tmp_path, user_rows, loss_type):
    options = {"loss_type": loss_type, "train_sampling_strategy": "sequential"}
    alone, _ = run(tmp_path / "a", user_rows, 1, **options)
    shared, _ = run(tmp_path / "b", user_rows, 4, **options)
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-5)
    expected = weights(alone)
    for name, value in weights(shared).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


def test_rows_of_one_user_meet_in_a_batch(tmp_path, user_rows):
    _, scattered = run(tmp_path / "a", user_rows, 1, loss_type="sft")
    trainer, together = run(tmp_path / "b", user_rows, 4, loss_type="sft")
    assert together < 0.8 * scattered
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(len(user_rows)))


def test_the_policys_own_likelihood_is_a_reward(tmp_path):
    """r = pi: with log Z = 0, as at the start, every residual log Z + log pi - log r is 0."""
    trainer = make_trainer(
        tmp_path, [LikelihoodReward()], loss_type="trajectory_balance", max_steps=1, train_dataset=make_rows(8),
        max_exact_elements=1, reward_floor=0.0,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["residual"] == pytest.approx(0.0, abs=1e-5)
    assert 0 < log["rewards/likelihood"] < 1
