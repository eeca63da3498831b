"""Stages that stop early, and how long a stage may wait before it is evaluated."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from gflowtrl import Recommender
from gflowtrl.data import sft_dataset
from gflowtrl.pipeline import run
from gflowtrl.pipeline.dry_run import dry_run
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.trainer.resume import last_checkpoint

from .micro import micro_recipe, micro_settings
from .test_run import Forbidden, Interrupt, weights


class InterruptAtTheEnd(TrainerCallback):
    """Ctrl-C after the last checkpoint, before the stage is done."""

    def on_train_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


class NoStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise AssertionError("a training that has stopped goes on")


QUICK = micro_settings(".")["evaluation"] | {"calibration_rows": 0}


def still(folder, patience, **changes):
    """A recipe that learns nothing: its first epoch is the best one."""
    settings = micro_settings(folder)
    still = {"learning_rate": 0.0, "num_train_epochs": 9, "early_stopping_patience": patience}
    options = {"sft": settings["sft"] | still, "gflownet": settings["gflownet"] | still} | changes
    return micro_recipe(folder, evaluation=QUICK, **options)


def epochs(stage):
    (last,) = {entry["epoch"] for entry in stage["log"] if entry["step"] == stage["steps"]}
    return last


def record(recipe, name):
    (folder,) = Path(recipe.output_dir).glob(f"{name}-*")
    return json.loads((folder / "done.json").read_text())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    recipe = still(tmp_path_factory.mktemp("still"), 2, stages=["sft"])
    return recipe, run(recipe, quiet=True)["methods"]["sft"]


def test_sft_stops_after_its_epochs_without_a_gain(stopped):
    recipe, result = stopped
    assert epochs(record(recipe, "sft")) == 3 and result["best_step"] == result["steps"] // 3


def test_every_section_has_its_own_patience(tmp_path):
    recipe = still(tmp_path, 1, start="untrained", control={"learning_rate": 0.0, "early_stopping_patience": 3})
    run(recipe, quiet=True)
    assert {name: epochs(record(recipe, name)) for name in ("control", "gflownet")} == {"control": 4, "gflownet": 2}


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_resumed_stage_keeps_its_count(stopped, tmp_path, epoch):
    _, result = stopped
    recipe, each = still(tmp_path, 2, stages=["sft"]), result["steps"] // 3
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[Interrupt("sft", epoch * each + 1)], quiet=True)
    again = run(recipe, quiet=True)["methods"]["sft"]
    assert (again["steps"], again["best_step"]) == (result["steps"], result["best_step"])


def test_a_stage_that_has_stopped_is_not_trained_further(stopped, tmp_path):
    """Interrupted when its last checkpoint is written, but not its model."""
    _, result = stopped
    recipe = still(tmp_path, 2, stages=["sft"])
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[InterruptAtTheEnd()], quiet=True)
    (folder,) = tmp_path.glob("sft-*")
    assert last_checkpoint(folder / "checkpoints").endswith(f"checkpoint-{result['steps']}")
    again = run(recipe, callbacks=[NoStep()], quiet=True)["methods"]["sft"]
    assert (again["steps"], again["best_step"]) == (result["steps"], result["best_step"])
    first, second = weights(result["model"]), weights(again["model"])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_patience_is_another_stage(stopped):
    recipe, _ = stopped
    with pytest.raises(AssertionError, match="was trained again"):
        run(still(recipe.output_dir, 3, stages=["sft"]), callbacks=[Forbidden()], quiet=True)


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("stage", ["sft", "gflownet"])
@pytest.mark.parametrize("by_epochs", [True, False])
def test_the_longest_delay_is_the_length_of_the_training(tmp_path, stage, by_epochs):
    """In the units that need the number of rows: epochs of `max_steps`, steps of `num_train_epochs`."""
    settings = micro_settings(tmp_path)

    def check(delay, **given):
        section = settings[stage] | given | {"eval_delay": delay}
        data = prepare(micro_recipe(tmp_path, **{stage: section}))
        dry_run(data)
        return data

    data = check(0)
    rows = data.splits.train
    if stage == "sft":
        rows = sft_dataset(data.splits.train_sequences, data.catalog, data.tokenizer, data.encoder.max_history_items)
    each = math.ceil(len(rows) / settings[stage]["per_device_train_batch_size"])
    given = {"max_steps": 3 * each} if by_epochs else {"num_train_epochs": 3, **EVERY_STEP}
    check(3 if by_epochs else 3 * each, **given)
    with pytest.raises(
        ValueError, match=rf"{stage}\.eval_delay is .*, but the training takes .* {'epochs' if by_epochs else 'steps'}"
    ):
        check(3.01 if by_epochs else 3 * each + 1, **given)


SCHEDULES = {
    "warmup_stable_decay": {"num_decay_steps": 4, "min_lr_ratio": 0.1},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_get_their_options_from_the_recipe(tmp_path, kind):
    """Two steps of warm-up to 2e-3, then the formula. A logged rate is that of the step it follows."""
    flow = micro_settings(tmp_path)["gflownet"] | {
        "max_steps": 10, "warmup_steps": 2, "lr_scheduler_type": kind, "lr_scheduler_kwargs": SCHEDULES[kind],
        "logging_steps": 1,
    }  # fmt: skip
    recipe = micro_recipe(tmp_path, start="untrained", stages=["gflownet"], gflownet=flow, evaluation=QUICK)
    run(recipe, quiet=True)
    found = [entry["learning_rate"] for entry in record(recipe, "gflownet")["log"] if "learning_rate" in entry]
    if kind == "cosine_with_min_lr":
        shares = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    else:
        shares = [1.0] * 4 + [0.1 + 0.9 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    first = [0.1, 0.55] if kind == "warmup_stable_decay" else [0.0, 0.5]
    assert found == pytest.approx([2e-3 * share for share in [*first, *shares]])


def test_histories_of_fifty_items(tmp_path):
    """Windows and prompts hold up to 50 items, the teacher sees the same ones, and the model needs the positions."""
    chance, items = random.Random(0), [f"i{number}" for number in range(80)]
    (tmp_path / "data").mkdir()
    semantic_ids = {item: [f"<a_{n // 10}>", f"<b_{n % 10}>"] for n, item in enumerate(items)}
    (tmp_path / "data" / "semantic_ids.json").write_text(json.dumps(semantic_ids))
    lines = [json.dumps({"user": f"u{user}", "items": chance.sample(items, 60 + user)}) for user in range(6)]
    (tmp_path / "data" / "sequences.jsonl").write_text("\n".join(lines))
    settings, ids, data = micro_settings(tmp_path), 2, {"max_history_items": 50}
    needed = 1 + 50 * ids + ids - 1
    model = settings["model"] | {"max_position_embeddings": needed}
    flow = settings["gflownet"] | {"max_steps": 2}
    recipe = micro_recipe(
        tmp_path / "out", start="untrained", stages=["gflownet"], data_dir=str(tmp_path / "data"), data=data,
        model=model, gflownet=flow, evaluation=QUICK,
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"A prompt of 50 items takes up to {1 + 50 * ids} tokens.*{needed - 1} pos"):
        dry_run(prepare(dataclasses.replace(recipe, model=model | {"max_position_embeddings": needed - 1})))
    lengths, seen = [], []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
            for batch in train_dataloader:
                lengths.append(int(batch["prompts"]["cut"].max()))
                seen.extend(map(len, batch["rows"].windows.histories))

    model = run(recipe, callbacks=[Watch()], quiet=True)["methods"]["gflownet"]["model"]
    assert max(lengths) == 1 + 50 * ids and max(seen) == 50
    recommender = Recommender.from_pretrained(model)
    history = prepare(recipe).splits.test["history"][0]
    assert len(history) > 50
    whole, cut = (recommender.recommend([items], k=5)[0] for items in (history, history[-50:]))
    assert whole == cut != recommender.recommend([history[-20:]], k=5)[0]
