"""Rows of a window computed together: the same training as with separate rows, with fewer tokens."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from gflowtrl.data import GroupCollator, PromptEncoder
from gflowtrl.losses import LOSSES
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward, LikelihoodReward
from tests.tiny import tiny_model, tiny_seq2seq

from .world import ITEMS, TOKENIZER, losses, make_catalog, make_rows, make_trainer, make_user_rows, teacher, weights


def run(tmp_path, shared: bool, reward_funcs=None, rows=None, seen=None, **options):
    """Train four steps on rows of users, some with more items than a prompt can contain, and count the tokens read.

    The drawn leaves are recorded in `seen`.
    """
    reward_funcs = [GroundTruthReward(), CollaborativeReward(teacher)] if reward_funcs is None else reward_funcs
    trainer = make_trainer(
        tmp_path, reward_funcs, train_dataset=make_user_rows(32, longest=9) if rows is None else rows,
        **{"max_history_items": 5, "optim": "sgd", "learning_rate": 0.1, "max_steps": 4, **options},
    )  # fmt: skip
    trainer.shares_prompts = shared
    if seen is not None:
        note_draws(trainer, seen)
    trainer.policy_of(trainer.model)  # the first call compares it with the model
    lengths = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.train()
    return trainer, sum(lengths)


def note_draws(trainer, drawn: dict[tuple[int, int], list[int]]) -> None:
    """Record the drawn leaves of each row at each step."""
    draw = trainer._draw

    def noted(step, *rest):
        trajectories = draw(step, *rest)
        for row, leaves in zip(step.row_ids.tolist(), trajectories.leaves.tolist(), strict=True):
            drawn[trainer.state.global_step, row] = leaves
        return trajectories

    trainer._draw = noted


def assert_same(tmp_path, kind="llama", **options):
    """Compare trajectories, losses and weights of a model of this kind at every step."""
    found = []
    for shared in (False, True):
        seen = {}
        trainer, _ = run(
            tmp_path / str(shared), shared, seen=seen, model=tiny_model(len(TOKENIZER), kind),
            train_sampling_strategy="sequential", **options,
        )  # fmt: skip
        logs = [log for log in trainer.state.log_history if "loss" in log]
        metrics = {name: [log[name] for log in logs] for name in ("loss", "grad_norm", "log_pi", "policy_entropy")}
        found.append((seen, metrics, weights(trainer)))
    (expected_draws, expected_metrics, expected_weights), (draws, metrics, trained) = found
    assert len(draws) == 4 * 8 and draws == expected_draws
    for name, values in expected_metrics.items():
        assert metrics[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    for name, value in trained.items():
        torch.testing.assert_close(value, expected_weights[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss_type", [*LOSSES, "sft,trajectory_balance"])
def test_every_loss_is_the_same(tmp_path, loss_type):
    """Half of the trajectories are on policy if the loss can use drawn ones."""
    first = loss_type.partition(",")[0]
    options = {"reward_funcs": [GroundTruthReward(), CollaborativeReward(teacher)], "loss_type": loss_type}
    if first in ("sft", "prefix_pointwise", "prefix_pairwise", "msl", "bear", "sdpo") and loss_type == first:
        options["reward_funcs"] = []
    if loss_type not in ("sft", "prefix_pointwise"):
        options["sampler"] = {"ground_truth": 1, "uniform": 1, "on_policy": 2}
    assert_same(tmp_path, **options)


@pytest.mark.parametrize("loss_type", ["sft", "prefix_pointwise", "prefix_pairwise", "sdpo"])
def test_the_vocabulary_as_label_space(tmp_path, loss_type):
    assert_same(tmp_path, reward_funcs=[], loss_type=loss_type, label_space="vocabulary")


@pytest.mark.parametrize("loss_type", ["exact_flow", "sft,detailed_balance"])
def test_gpt_neox_is_the_same(tmp_path, loss_type):
    assert_same(tmp_path, kind="gpt_neox", loss_type=loss_type)


def test_adapters(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    assert_same(tmp_path, loss_type="sft,detailed_balance", peft_config=config)


@pytest.mark.parametrize("sampler", ["beam", "stochastic_beam", {"ground_truth": 1, "unobserved": 1, "beam": 2}])
def test_other_samplers(tmp_path, sampler):
    assert_same(tmp_path, loss_type="vargrad", sampler=sampler)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "exact_flow", "ref_weight": 0.5},
        {"loss_type": "vargrad", "ref_weight": 0.5},
        {"loss_type": "vargrad", "max_exact_elements": 100, "exact_top_items": 4},
        {"loss_type": "exact_flow", "max_exact_elements": 100, "exact_top_items": 4},
        {"loss_type": "trajectory_balance", "num_generations": 1, "sampler": "on_policy"},
    ],
    ids=["exact prior", "prior of drawn leaves", "drawn rewards", "top rewards", "one on policy"],
)  # fmt: skip
def test_other_rewards(tmp_path, options):
    assert_same(tmp_path, **options)


def test_rewards_that_read_prompts(tmp_path):
    """Models that use the step's prompts, and a plain function that gets their text."""
    texts = {}

    def spelled(prompts, row_id, **_):
        texts.setdefault(tuple(row_id), []).append(prompts)
        return [1.0 + len(prompt) % 3 for prompt in prompts]

    frozen = tiny_model(len(TOKENIZER), seed=1)
    rewards = [LikelihoodReward(frozen), LikelihoodReward(), spelled]
    assert_same(tmp_path, reward_funcs=rewards, loss_type="vargrad", reward_floor=0.0)
    assert texts and all(separate == shared for separate, shared in texts.values())
    assert_same(tmp_path / "all", reward_funcs=[LikelihoodReward(frozen)], loss_type="exact_flow")


def test_accumulation_cuts_windows_differently_and_nothing_changes(tmp_path):
    whole, _ = run(tmp_path / "a", True, loss_type="exact_flow")
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    parts, _ = run(tmp_path / "b", True, loss_type="exact_flow", **options)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    expected = weights(whole)
    for name, value in weights(parts).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["group_by_length", "random", "sequential"])
def test_every_micro_batch_has_the_right_number_of_prompts(tmp_path, strategy):
    rows = make_user_rows(40, longest=9)
    trainer = make_trainer(tmp_path, loss_type="sft", train_dataset=rows, train_sampling_strategy=strategy)
    sizes, trunks, met = [], [], []
    for batch in trainer.get_train_dataloader():
        sizes.append(len(batch["prompts"]["cut"]))
        trunks.append(len(batch["prompts"]["input_ids"]))
        met += batch["row_ids"].tolist()
    assert sizes == [8] * 5 and sorted(met) == rows["row_id"][:]
    if strategy != "random":
        windows = trainer._windows_of(rows).groups
        assert len(windows) <= sum(trunks) <= len(windows) + 4  # one more at the end of a batch


def test_rows_of_one_user_need_fewer_tokens(tmp_path):
    _, separate = run(tmp_path / "a", False, [], loss_type="sft")
    _, shared = run(tmp_path / "b", True, [], loss_type="sft")
    assert shared < 0.6 * separate


def test_the_teacher_sees_the_same_items_as_the_policy(tmp_path):
    """The items of the prompts, not of the whole histories."""
    seen = []

    def watching(histories):
        seen.extend(map(tuple, histories))
        return teacher(histories)

    rows = make_user_rows(11, longest=12)
    trainer, _ = run(
        tmp_path, True, [GroundTruthReward(), CollaborativeReward(watching)], rows=rows, loss_type="exact_flow",
        max_steps=1, per_device_train_batch_size=11, max_history_items=3,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(seen) == sorted(map(tuple, batch["rows"].windows.histories))
    assert max(map(len, seen)) == 3 < max(map(len, rows["history"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "The prompts form 10 windows, each of which is computed once"),
        ({"model": tiny_seq2seq(len(TOKENIZER), "bart")}, "Every prompt is computed separately: an encoder reads"),
        ({"rows": make_rows(24)}, "Every prompt is computed separately: no history continues"),
    ],
)
def test_the_log_describes_the_prompts(tmp_path, caplog, options, words):
    caplog.set_level(logging.INFO, logger="gflowtrl")
    model = options.pop("model", None)
    run(tmp_path, True, [], loss_type="sft", model=model, **options)
    (line,) = [record.message for record in caplog.records if record.message.startswith("Prompts contain")]
    assert words in line and "targets" in line


def test_the_policys_likelihood_can_be_a_reward(tmp_path):
    """r = pi: with log Z = 0, as at the start, every residual log Z + log pi - log r is 0."""
    trainer = make_trainer(
        tmp_path, [LikelihoodReward()], loss_type="trajectory_balance", max_steps=1, train_dataset=make_rows(8),
        max_exact_elements=1, reward_floor=0.0,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["residual"] == pytest.approx(0.0, abs=1e-5)
    assert 0 < log["rewards/likelihood"] < 1


def test_rows_of_other_datasets_have_no_windows(tmp_path):
    """Predictions after training for rows with known and other ids, and training on other rows."""
    trainer, _ = run(tmp_path, True, [], loss_type="sft", max_history_items=3)
    held_out = make_rows(6, first_row_id=100, longest=6)
    expected = trainer.evaluate(held_out)["eval_ndcg@10"]
    for first in (100, 9000):
        found = trainer.predict(make_rows(6, first_row_id=first, longest=6))
        assert found.metrics["test_ndcg@10"] == expected
    trainer.train_dataset = make_rows(9, first_row_id=9000)
    assert len(next(iter(trainer.get_train_dataloader()))["row_ids"]) == 8
    trainer.train_dataset = Dataset.from_list([{"row_id": 1, "history": ["nope"], "target": ITEMS[0]}])
    with pytest.raises(ValueError, match="Row 1 contains item 'nope'"):
        trainer.get_train_dataloader()


def test_a_custom_collator_is_kept(tmp_path):
    trainer, _ = run(tmp_path, True, [], loss_type="sft")
    met = []

    class Watching(GroupCollator):
        def __call__(self, rows):
            met.append(len(rows))
            return super().__call__(rows)

    trainer.data_collator = Watching(trainer._encoder)
    assert "trunk" not in next(iter(trainer.get_train_dataloader()))["prompts"] and met


def test_a_custom_encoder_gets_whole_histories(tmp_path):
    handed = []

    class Own(PromptEncoder):
        def __call__(self, histories):
            handed.extend(map(len, histories))
            return super().__call__(histories)

    rows, encoder = make_user_rows(24, longest=9), Own(make_catalog(), TOKENIZER, 3)
    trainer = make_trainer(tmp_path, [], loss_type="sft", train_dataset=rows, prompt_encoder=encoder)
    batches = list(trainer.get_train_dataloader())
    assert sorted(handed) == sorted(map(len, rows["history"]))
    assert max(len(history) for batch in batches for history in batch["rows"].windows.histories) == 3


def test_with_many_trajectories_prompts_are_computed_separately(tmp_path):
    """So many that no two prompts share a trunk."""
    trainer = make_trainer(tmp_path, [GroundTruthReward()], num_generations=61, train_dataset=make_user_rows(24))
    assert "trunk" not in next(iter(trainer.get_train_dataloader()))["prompts"]
    few = make_trainer(tmp_path, [GroundTruthReward()], num_generations=40, train_dataset=make_user_rows(24))
    prompts = next(iter(few.get_train_dataloader()))["prompts"]
    assert int(prompts["trunk"].bincount().max()) == 3
