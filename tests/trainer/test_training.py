"""Complete trainings: trained parameters, learning rates, reproducibility and resume."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from gflowtrl.losses import LOSSES
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from tests.tiny import tiny_model, tiny_seq2seq

from .world import TOKENIZER, losses, make_rows, make_trainer, teacher, weights


def rewards() -> list:
    return [GroundTruthReward(), CollaborativeReward(teacher)]


@pytest.mark.parametrize(
    ("loss_type", "model"),
    [
        ("sft", tiny_model), ("vargrad", tiny_model), ("trajectory_balance", tiny_model), ("exact_flow", tiny_model),
        ("sft,detailed_balance", tiny_model), ("vargrad,exact_flow", tiny_model), ("sft,vargrad", tiny_seq2seq),
        ("detailed_balance", tiny_seq2seq),
    ],
)  # fmt: skip
def test_every_parameter_is_trained(tmp_path, loss_type, model):
    trainer = make_trainer(tmp_path, rewards(), model(len(TOKENIZER)), loss_type=loss_type)
    before = weights(trainer)
    trainer.train()
    still = [name for name, value in weights(trainer).items() if torch.equal(value, before[name])]
    assert not still, f"Parameters {still} have not changed."
    headed = any(LOSSES[name].needs_flow_heads for name in loss_type.split(","))
    assert any("flow_heads" in name for name in before) == headed


def test_the_head_has_its_own_learning_rate(tmp_path):
    trainer = make_trainer(
        tmp_path, rewards(), loss_type="trajectory_balance", learning_rate=1e-3, log_z_learning_rate=0.3,
        weight_decay=0.1, lr_scheduler_type="linear", max_steps=2,
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    head = {id(p) for p in trainer.model.flow_heads.parameters()}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(trainer.model.parameters()))
    assert all(rate == (0.3 if p in head else 1e-3) for p, rate in rates.items())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(trainer.model.flow_heads.inner.weight)] == 0.1
    assert decays[id(trainer.model.flow_heads.inner.bias)] == 0.0
    trainer.train()
    # After the first step the schedule has halved both. The policy's rate is logged.
    assert [log["learning_rate"] for log in trainer.state.log_history if "loss" in log] == [1e-3, 5e-4]
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1e-3, 0.3}


def test_a_custom_optimizer_is_used_unchanged(tmp_path):
    model = tiny_model(len(TOKENIZER))
    own = torch.optim.SGD(model.parameters(), lr=0.123)
    trainer = make_trainer(tmp_path, rewards(), model=model, optimizers=(own, None))
    assert trainer.create_optimizer() is own
    assert [group["lr"] for group in own.param_groups] == [0.123]


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    def run(seed: int) -> tuple[list[float], dict]:
        model = tiny_model(len(TOKENIZER))
        torch.seed()  # earlier random draws must not matter, not even for the head's initial weights
        trainer = make_trainer(tmp_path, rewards(), model, loss_type="sft,trajectory_balance", seed=seed)
        trainer.train()
        return losses(trainer), weights(trainer)

    first, again, other = run(7), run(7), run(8)
    assert first[0] == again[0] != other[0]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    """Resume in the second epoch, with dropout, accumulation, on-policy draws, evaluation and a head."""

    def trainer(model_seed: int, folder: Path, **options):
        model = tiny_model(len(TOKENIZER), seed=model_seed)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        return make_trainer(
            folder, rewards(), model, loss_type="sft,trajectory_balance", per_device_train_batch_size=4,
            gradient_accumulation_steps=2, max_steps=7, save_strategy="steps", save_steps=5, eval_strategy="steps",
            eval_steps=2, eval_dataset=make_rows(5, 1, 500), lr_scheduler_type="cosine", **options,
        )  # fmt: skip

    whole = trainer(0, tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    resumed = trainer(1, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())

    def history(trainer) -> list[dict]:
        clock = ("runtime", "per_second", "seconds/")
        logs = [log for log in trainer.state.log_history if "train_loss" not in log]
        return [{name: value for name, value in log.items() if not any(c in name for c in clock)} for log in logs]

    assert history(resumed) == history(whole)


def test_every_epoch_has_each_row_once_in_another_order(tmp_path):
    seen = []
    trainer = make_trainer(
        tmp_path, rewards(), num_train_epochs=3, max_steps=-1, train_dataset=make_rows(20, longest=9)
    )
    step = trainer.compute_loss
    trainer.compute_loss = lambda model, batch, **k: seen.append(batch) or step(model, batch, **k)
    trainer.train()
    order = torch.cat([batch["row_ids"] for batch in seen]).view(3, 20)
    assert all(sorted(epoch) == list(range(100, 120)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 3
    lengths = [[len(history) for history in batch["rows"].columns["history"]] for batch in seen]
    spread = [max(batch) - min(batch) for batch in lengths if len(batch) == 8]
    assert sum(spread) / len(spread) < 6  # nearly always, for random batches of 8


def test_only_adapters_are_trained_and_resumed(tmp_path):
    def trainer(**options):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return make_trainer(
            tmp_path, rewards(), loss_type="trajectory_balance", peft_config=config, save_strategy="steps",
            save_steps=2, **options,
        )  # fmt: skip

    whole = trainer()
    before = weights(whole)
    whole.train()
    moved = {name for name, value in weights(whole).items() if not torch.equal(value, before[name])}
    trained = {name for name in before if any(part in name for part in ("lora_", "tokens_delta", "flow_heads"))}
    assert moved == trained
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
