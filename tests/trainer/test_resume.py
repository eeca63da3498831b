"""A training resumes with its complete state or not at all."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gflowtrl import APAOConfig, APAOTrainer, GFlowNetTrainer
from gflowtrl.files import damage_of
from gflowtrl.rewards import GroundTruthReward
from gflowtrl.trainer.resume import _deepspeed_files, _engine_files, last_checkpoint, remove_checkpoints
from tests.tiny import tiny_model

from .world import TOKENIZER, make_catalog, make_rows, make_trainer, weights


STATE = (
    *("optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("flow_heads.safetensors", "sampler.safetensors", "trainer_state.json", "model.safetensors"),
)


def trainer(folder, **options) -> GFlowNetTrainer:
    settings = {"loss_type": "trajectory_balance", "sampler": {"ground_truth": 1, "replay": 3}, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2, **options}
    return make_trainer(folder, [GroundTruthReward()], **settings)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A checkpoint from the middle of a training with flow heads and a replay buffer."""
    folder = tmp_path_factory.mktemp("written")
    trainer(folder).train()
    return folder / "checkpoint-2"


@pytest.fixture
def checkpoint(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoint-2"))


def refused(checkpoint, message: str, **options) -> None:
    """Check that resuming raises an error before the first step."""
    resumed = trainer(checkpoint.parent / "resumed", **options)
    before = weights(resumed)
    with pytest.raises(ValueError, match=message):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(resumed).items())


def test_a_complete_checkpoint_resumes(checkpoint):
    resumed = trainer(checkpoint.parent / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4


@pytest.mark.parametrize("name", STATE[:-1])
def test_a_missing_part_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    refused(checkpoint, rf"{re.escape(str(checkpoint))}.*{name}|{name} is missing")


@pytest.mark.parametrize("name", STATE)
def test_a_damaged_part_is_named(checkpoint, name):
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(checkpoint, rf"{name} is (empty or cut off|not a whole safetensors file|not valid JSON)")


def test_changed_bytes_of_a_small_part_are_named(checkpoint):
    file = checkpoint / "rng_state.pth"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    refused(checkpoint, r"damaged: rng_state\.pth does not have its checksum")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"epoch": "x"}, "epoch must be a number, but it is 'x'"),
        ({"log_history": [1]}, "log_history must be fields with values"),
        ({"global_step": True}, "global_step must be a whole number"),
        ({"global_step": -2}, "global_step is -2"),
        ({"best_model_checkpoint": 7}, "best_model_checkpoint must be text"),
        ({"log_history": {}}, "log_history is {}"),
        ({"stateful_callbacks": [1]}, "stateful_callbacks is "),
        ({"new_field": 1}, "There is no field 'new_field'"),
    ],
)
def test_a_state_with_values_of_another_type_is_named(checkpoint, caplog, change, reason):
    """The Trainer of transformers would fail with an error that names no file."""
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(checkpoint, rf"{re.escape(str(file))} cannot be read as the state of a training \({reason}")
    assert last_checkpoint(checkpoint.parent) is None and reason in caplog.text


def test_steps_of_a_state_may_be_whole_floats(checkpoint):
    """As for `logging_steps=1.0`."""
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"logging_steps": 1.0}))
    assert last_checkpoint(checkpoint.parent) == str(checkpoint)


def with_best(folder, **options) -> GFlowNetTrainer:
    """A trainer whose first checkpoint is the best one, since no later one is measured as better."""
    return trainer(
        folder, eval_dataset=make_rows(6, 1, 500), eval_strategy="steps", eval_steps=2, learning_rate=0.0,
        load_best_model_at_end=True, metric_for_best_model="eval_ndcg@10", greater_is_better=True, **options,
    )  # fmt: skip


def test_the_best_checkpoint_of_a_moved_folder_is_found(tmp_path):
    with_best(tmp_path / "first").train()
    moved = tmp_path / "moved"
    (tmp_path / "first").rename(moved)
    resumed = with_best(moved, max_steps=6)
    resumed.train(resume_from_checkpoint=str(moved / "checkpoint-4"))
    assert resumed.state.best_model_checkpoint == str(moved / "checkpoint-2")
    assert "_BestSoFar" not in {type(callback).__name__ for callback in resumed.callback_handler.callbacks}


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_lost_best_checkpoint_is_an_error(tmp_path, damage):
    """Without it, the training would end with another model than an uninterrupted one."""
    with_best(tmp_path).train()
    if damage == "missing":
        shutil.rmtree(tmp_path / "checkpoint-2")
    else:
        (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"cut")
    resumed = with_best(tmp_path, max_steps=6)
    with pytest.raises(ValueError, match=r"trainer_state\.json names '.*checkpoint-2' as the best checkpoint so far"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    resumed.args.load_best_model_at_end = False
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 6


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sampler", lambda state: state | {"replay/more": torch.ones(1)}, "ReplaySampler has the entries"),
        ("sampler", lambda state: state | {"replay/leaves": torch.ones(1)}, "cannot be read as the state"),
        ("flow_heads", lambda state: {f"x.{name}": value for name, value in state.items()}, "The flow heads in"),
    ],
)
def test_a_part_of_another_training_is_named(checkpoint, name, change, message):
    file = checkpoint / f"{name}.safetensors"
    save_file(change(load_file(file)), file)
    resumed = trainer(checkpoint.parent / "resumed")
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}.*{message}"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_with_only_the_model_is_an_error(tmp_path):
    trainer(tmp_path, save_only_model=True, max_steps=2).train()
    refused(tmp_path / "checkpoint-2", r"only the model \(save_only_model=True\), not .*optimizer.pt.*as the model")


def test_a_training_can_resume_with_another_number_of_processes(checkpoint, caplog):
    """Only dropout changes. A state that is split over the processes (ZeRO, samplers) is an error."""
    shutil.copy(checkpoint / "rng_state.pth", checkpoint / "rng_state_0.pth")
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_1.pth")
    resumed = trainer(checkpoint.parent)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert "was written by 2 process(es), and 1 resume from it" in caplog.text
    (checkpoint / "optimizer.pt").unlink()
    refused(checkpoint, r"written by 2 process\(es\), but 1 are training")


def test_a_loss_with_heads_does_not_resume_from_one_without(tmp_path):
    trainer(tmp_path, loss_type="vargrad", max_steps=2).train()
    refused(tmp_path / "checkpoint-2", "lacks flow_heads.safetensors")


def test_prefix_weights_are_part_of_the_state(tmp_path):
    def apao(**options) -> APAOTrainer:
        args = APAOConfig(
            str(tmp_path), max_steps=4, save_strategy="steps", save_steps=2, use_cpu=True, disable_tqdm=True, **options
        )
        rows, catalog = make_rows(), make_catalog()
        return APAOTrainer(
            tiny_model(len(TOKENIZER)), args, "ground_truth", train_dataset=rows, catalog=catalog,
            processing_class=TOKENIZER,
        )  # fmt: skip

    apao().train()
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match=r"has the prefix weights of \['prefix_pointwise'\], but .*pairwise"):
        apao(method="pairwise", num_negatives=2).train(resume_from_checkpoint=str(checkpoint))
    file = checkpoint / "prefix_weights.safetensors"
    save_file({"prefix_pointwise.other": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}.*'prefix_pointwise.log_weights' is missing"):
        apao().train(resume_from_checkpoint=str(checkpoint))
    file.unlink()
    with pytest.raises(ValueError, match=r"lacks prefix_weights\.safetensors"):
        apao().train(resume_from_checkpoint=str(checkpoint))


def test_the_best_model_has_its_heads(tmp_path):
    best = trainer(
        tmp_path, eval_dataset=make_rows(6, 1, 500), eval_strategy="steps", eval_steps=2, max_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_ndcg@10", greater_is_better=True,
    )  # fmt: skip
    best.train()
    (tmp_path / "checkpoint-2" / "flow_heads.safetensors").unlink()
    with pytest.raises(ValueError, match=r"flow_heads\.safetensors is missing: .* flow heads"):
        best._load_best_model()


def test_an_empty_sampler_state_differs_from_a_lost_one(tmp_path):
    """A buffer that is still empty."""
    first = trainer(tmp_path, max_steps=1, save_steps=1)
    first.sampler.observe = lambda *_: None
    first.train()
    assert not len(load_file(tmp_path / "checkpoint-1" / "sampler.safetensors")["replay/row_ids"])


def test_a_checkpoint_without_an_empty_state_resumes(tmp_path):
    """Earlier versions did not write an empty state for a mixture."""
    options = {"sampler": {"ground_truth": 1, "on_policy": 3}, "loss_type": "vargrad"}
    trainer(tmp_path, **options).train()
    (tmp_path / "checkpoint-2" / "sampler.safetensors").unlink()
    resumed = trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_a_checkpoint_keeps_the_users_limit(tmp_path):
    trainer(tmp_path, save_total_limit=1, max_steps=4).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False).save_total_limit == 1


def test_folders_that_are_not_checkpoints_are_skipped(checkpoint, caplog):
    folder = checkpoint.parent
    for name in ("checkpoint-abc", "checkpoint-", "checkpoint-9-copy", "checkpoint-7.bak"):
        shutil.copytree(checkpoint, folder / name)
    (folder / "checkpoint-8").write_text("a file")
    for step, content in ((10, "[1]"), (11, '{"epoch": 1}'), (12, '{"global_step": 1'), (13, "")):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    (folder / "checkpoint-14").mkdir()
    with caplog.at_level(logging.WARNING, "gflowtrl"):
        assert last_checkpoint(folder) == str(checkpoint)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 5 and all("trainer_state.json" in line for line in told)
    for step in (10, 11, 12, 13, 14):
        refused(folder / f"checkpoint-{step}", rf"checkpoint-{step}/trainer_state\.json")
    refused(folder / "checkpoint-99", "checkpoint-99 is not a folder")


@pytest.mark.parametrize("best", [True, False])
def test_copies_of_checkpoints_are_not_removed_by_a_training(checkpoint, best):
    folder, aside = checkpoint.parent, {"checkpoint-abc", "checkpoint-1-good"}
    for name in aside:
        shutil.copytree(checkpoint, folder / name)
    options = {"eval_dataset": make_rows(6, 1, 500), "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_ndcg@10"} if best else {}
    resumed = trainer(folder, save_steps=1, save_total_limit=1, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and resumed.args.save_total_limit == 1
    left = Path(resumed.state.best_model_checkpoint).name if best else "checkpoint-4"
    assert {path.name for path in folder.glob("checkpoint-*")} == aside | {left}


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (step, step))
    remove_checkpoints(tmp_path, 3, {tmp_path / "checkpoint-1", tmp_path / "checkpoint-5"})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-4", "checkpoint-5"}
    remove_checkpoints(tmp_path, 1, {tmp_path / "checkpoint-1", tmp_path / "checkpoint-5"})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-5"}


@pytest.mark.parametrize(
    ("name", "content", "damage"),
    [
        ("a.json", b'{"a": 1}', None),
        ("a.json", b'{"a": 1', "is not valid JSON"),
        ("a.json", b"\xff", "is not valid JSON"),
        ("a.safetensors", b"", "is not a whole safetensors file"),
        ("a.pt", b"PK", "is empty or cut off"),
        ("a.txt", b"", None),
    ],
)
def test_damage_is_detected_from_the_format_of_a_file(tmp_path, name, content, damage):
    assert damage_of(tmp_path / name) == "is missing"
    (tmp_path / name).write_bytes(content)
    found = damage_of(tmp_path / name)
    assert found is None if damage is None else found.startswith(damage)


def test_the_files_of_an_engine(checkpoint):
    """Sharded engines have other optimizer files: DeepSpeed one per process, in the folder that `latest` names; FSDP a
    file or a folder."""
    assert _deepspeed_files(checkpoint, 2, 1) == ["latest"]
    (checkpoint / "latest").write_text("global_step2")
    lost = "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert _deepspeed_files(checkpoint, 2, 1) == [lost] and _deepspeed_files(checkpoint, 0, 1) == ["global_step2"]
    (checkpoint / "global_step2").mkdir()
    there = "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (checkpoint / there).touch()
    assert _deepspeed_files(checkpoint, 2, 1) == [there]
    for kind, file in (("FULL", "optimizer.bin"), ("SHARDED", "optimizer_0"), ("LOCAL", "optimizer_0_rank1.bin")):
        plugin = SimpleNamespace(state_dict_type=f"StateDictType.{kind}_STATE_DICT")
        state = SimpleNamespace(fsdp_plugin=plugin)
        engine = SimpleNamespace(
            args=SimpleNamespace(world_size=2, process_index=1), accelerator=SimpleNamespace(state=state, scaler=None),
            is_deepspeed_enabled=False, is_fsdp_enabled=True,
        )  # fmt: skip
        assert _engine_files(engine, checkpoint) == ["rng_state_1.pth", "scheduler.pt", file]
