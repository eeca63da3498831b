"""A value that is not finite stops training: the error names step, part and remedy, and nothing is saved."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from gflowtrl import APAOConfig, APAOTrainer
from gflowtrl.finite import NonFiniteError
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.trainer.finite_steps import CHECK_EVERY, FP16_PATIENCE, GRADIENT, LOSS, FirstSteps
from tests.tiny import tiny_model

from .world import TOKENIZER, make_catalog, make_rows, make_trainer


NAN = float("nan")
PAIR = {"save_strategy": "steps", "save_steps": 2}


class SpoilAt(TrainerCallback):
    """Write a number into a tensor of the model after a step."""

    def __init__(self, step: int, name: str = "lm_head.weight", value: float = NAN):
        self.step, self.name, self.value = step, name, value

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                dict(model.named_parameters())[self.name].view(-1)[-1] = self.value


def spoiled(value: float = NAN):
    model = tiny_model(len(TOKENIZER))
    with torch.no_grad():
        model.lm_head.weight[3, 1] = value
    return model


def rewards() -> list:
    return [GroundTruthReward()]


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_weights_are_checked_when_the_trainer_is_created(tmp_path, value):
    with pytest.raises(NonFiniteError, match=r"LlamaForCausalLM has NaN or infinity in its weight 'lm_head.weight'"):
        make_trainer(tmp_path, rewards(), model=spoiled(value))
    with pytest.raises(NonFiniteError, match="The reference model has NaN"):
        make_trainer(tmp_path, rewards(), ref_model=spoiled(value), ref_weight=1.0)
    args = APAOConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(NonFiniteError, match="'lm_head.weight'"):
        APAOTrainer(
            spoiled(value), args, train_dataset=make_rows(), catalog=make_catalog(), processing_class=TOKENIZER
        )


def test_nonfinite_weights_stop_training_before_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, rewards(), max_steps=6, logging_steps=100, callbacks=[SpoilAt(3)], **PAIR)
    with pytest.raises(
        NonFiniteError, match=r"at step 4 the policy's score was not finite.*Lower learning_rate.*weight 'model"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not any("nan" in str(log).lower() for log in trainer.state.log_history)


def test_saving_a_checkpoint_checks_weights_of_tokens_that_were_never_scored(tmp_path):
    unused = SpoilAt(1, "model.embed_tokens.weight")  # no prompt uses the last token of the table
    model = tiny_model(len(TOKENIZER) + 1)
    trainer = make_trainer(tmp_path, rewards(), model=model, callbacks=[unused], **PAIR)
    with pytest.raises(NonFiniteError, match=r"The model was not saved: its weight 'model.embed_tokens.weight'"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(NonFiniteError, match="The model was not saved"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


def test_a_loss_that_is_not_finite_is_named(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, rewards(), loss_type="sft,vargrad", max_steps=5)
    spec = trainer.losses["vargrad"]

    @functools.wraps(spec.function)
    def overflowing(*tensors, **options):
        return spec.function(*tensors, **options) + (math.inf if trainer.state.global_step == 2 else 0.0)

    monkeypatch.setitem(trainer.losses, "vargrad", replace(spec, function=overflowing))
    with pytest.raises(NonFiniteError, match="at step 3 the loss 'vargrad' was not finite"):
        trainer.train()


def test_gradients_and_heads_are_named(tmp_path):
    trainer = make_trainer(tmp_path / "gradient", rewards(), loss_type="sft", max_steps=3)
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * (NAN if trainer.state.global_step == 1 else 1))
    with pytest.raises(NonFiniteError, match="at step 2 the gradient was not finite"):
        trainer.train()
    head = SpoilAt(1, "flow_heads.outer.bias")
    trainer = make_trainer(tmp_path / "head", rewards(), loss_type="trajectory_balance", max_steps=3, callbacks=[head])
    with pytest.raises(NonFiniteError, match="at step 2 the flow head was not finite.*log_z_learning_rate"):
        trainer.train()


def test_the_reference_is_named(tmp_path):
    trainer = make_trainer(tmp_path, rewards(), ref_weight=1.0, max_steps=3)
    with torch.no_grad():
        trainer.reference.model.model.norm.weight[0] = math.inf
    with pytest.raises(NonFiniteError, match="The reference model has NaN or infinity in its weight 'model.norm.w"):
        trainer.train()


def test_steps_are_checked_between_distant_log_lines(tmp_path):
    trainer = make_trainer(
        tmp_path, rewards(), loss_type="sft", max_steps=2 * CHECK_EVERY, logging_strategy="no", callbacks=[SpoilAt(1)],
        per_device_train_batch_size=1,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="at step 2 "):
        trainer.train()
    assert trainer.state.global_step == CHECK_EVERY


def test_evaluation_during_and_after_training(tmp_path, monkeypatch):
    rows = make_rows(6, 1, 500)
    trainer = make_trainer(
        tmp_path, rewards(), eval_dataset=rows, eval_strategy="steps", eval_steps=2, callbacks=[SpoilAt(1)],
        logging_strategy="no",
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="at step 2"):
        trainer.train()
    assert not any("eval_ndcg@10" in log for log in trainer.state.log_history)
    sound = make_trainer(tmp_path, rewards(), eval_dataset=rows)
    assert 0 <= sound.evaluate()["eval_ndcg@10"] <= 1
    with torch.no_grad():
        sound.model.lm_head.weight[0] = NAN  # padding is never scored
    with pytest.raises(NonFiniteError, match="cannot be evaluated: its weight 'lm_head.weight'"):
        sound.evaluate()
    overflowing = make_trainer(tmp_path, rewards(), eval_dataset=rows)
    overflowing.model.model.norm.register_forward_hook(lambda module, inputs, output: output * math.inf)
    with pytest.raises(NonFiniteError, match="although its weights are finite"):
        overflowing.evaluate()


# ------------------------------------------------------------------------------------------------------------- resume
def trained(folder: Path, **options):
    trainer = make_trainer(folder, rewards(), loss_type="trajectory_balance", max_steps=2, **(PAIR | options))
    trainer.train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "checkpoint-2 has NaN or infinity in its weight"),
        ("flow_heads.safetensors", r"checkpoint-2 \(flow_heads.safetensors\) has NaN"),
        ("optimizer.pt", "cannot be resumed: the optimizer's state contains NaN or infinity, exp_avg of '"),
        ("sampler.safetensors", "sampler.safetensors holds NaN or infinity in 'residuals'"),
    ],
)
def test_a_resumed_state_is_checked(tmp_path, file, message):
    sampler = {"sampler": {"type": "adaptive_mixture", "sources": {"ground_truth": 1, "on_policy": 3}}}
    options = sampler if file.startswith("sampler") else {}
    checkpoint = trained(tmp_path, **options)
    path = checkpoint / file
    state = torch.load(path) if file.endswith(".pt") else load_file(path)
    if file.endswith(".pt"):
        state["state"][0]["exp_avg"].view(-1)[0] = NAN
        torch.save(state, path)
    else:
        next(iter(state.values())).view(-1)[0] = NAN
        save_file(state, path, {"format": "pt"})
    resumed = make_trainer(tmp_path, rewards(), loss_type="trajectory_balance", max_steps=4, **(PAIR | options))
    with pytest.raises(NonFiniteError, match=message):
        resumed.train(resume_from_checkpoint=str(checkpoint))


# ------------------------------------------------------------------------------------------------ the flags of steps
def test_the_first_step_and_part_are_reported():
    marks = FirstSteps(torch.device("cpu"), start=0, forgives=False)
    for step, (reward, loss, norm) in enumerate([(1, 1, 1), (1, 1, NAN), (1, NAN, NAN), (NAN, 1, 1)], 1):
        marks.note(step, {"the reward": torch.tensor([1.0, reward])})
        marks.note(step, {LOSS: torch.tensor(float(loss))})
        marks.note(step, {GRADIENT: torch.tensor(float(norm))})
    assert marks.earliest(4) == (2, 2, GRADIENT)
    marks.note(1, {"the reward": torch.tensor(NAN)})
    assert marks.earliest(4)[2] == "the reward"


def test_steps_that_fp16_skips_are_ignored():
    marks = FirstSteps(torch.device("cpu"), start=0, forgives=True)
    for step in range(1, 20):
        marks.note(step, {LOSS: torch.tensor(1.0)})
        marks.note(step, {GRADIENT: torch.tensor(math.inf)})
    assert marks.earliest(19) is None
    for step in range(20, FP16_PATIENCE + 1):
        marks.note(step, {GRADIENT: torch.tensor(math.inf)})
    assert marks.earliest(FP16_PATIENCE) == (1, 1, GRADIENT)
    marks.note(FP16_PATIENCE + 1, {GRADIENT: torch.tensor(1.0)})
    assert marks.earliest(FP16_PATIENCE + 1) is None


def test_a_loss_that_is_never_finite_stops_training_in_fp16():
    marks = FirstSteps(torch.device("cpu"), start=7, forgives=True)
    marks.note(8, {LOSS: torch.tensor(NAN)})
    marks.note(9, {LOSS: torch.tensor(NAN)})
    assert marks.earliest(9) == (8, 0, LOSS)
    marks.note(10, {LOSS: torch.tensor(1.0)})
    marks.note(11, {LOSS: torch.tensor(NAN)})
    assert marks.earliest(11) is None
