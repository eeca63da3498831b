"""`report_to` is transformers' own; what TensorBoard writes outlives the checkpoints."""

import json
from pathlib import Path

import pytest
from transformers import TrainerCallback

from gflowtrl.pipeline import run

from .micro import micro_recipe, micro_settings


def short_recipe(folder, **sft):
    settings = micro_settings(folder)
    return micro_recipe(
        folder, stages=["sft"], sft=settings["sft"] | {"num_train_epochs": 1, "logging_steps": 1} | sft
    )


class Writer(TrainerCallback):
    """Writes where TensorBoard does."""

    def on_train_end(self, args, state, control, **kwargs):
        assert args.run_name == "micro-sft" and args.report_to == []
        folder = Path(args.output_dir, "runs", "today")
        folder.mkdir(parents=True)
        (folder / "events").write_text("curves")


def test_curves_outlive_the_checkpoints(tmp_path):
    results = run(short_recipe(tmp_path), callbacks=[Writer()], quiet=True)
    folder = Path(results["methods"]["sft"]["model"]).parent
    assert (folder / "runs" / "today" / "events").read_text() == "curves"
    assert not (folder / "checkpoints").exists()


def test_tracking_is_no_part_of_a_result(tmp_path):
    run(short_recipe(tmp_path), quiet=True)
    run(short_recipe(tmp_path, report_to="none", run_name="other", project="mine"), quiet=True)
    assert len(list(tmp_path.glob("sft-*"))) == 1


def test_tensorboard_holds_the_curves(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    results = run(short_recipe(tmp_path, report_to="tensorboard"), quiet=True)
    folder = Path(results["methods"]["sft"]["model"]).parent
    (file,) = (folder / "runs").rglob("events*")
    found = events.EventAccumulator(str(file)).Reload()
    log = [entry for entry in results_log(folder) if "eval_ndcg@5" in entry]
    assert [e.value for e in found.Scalars("eval/ndcg@5")] == pytest.approx([e["eval_ndcg@5"] for e in log], rel=1e-6)
    assert len(found.Scalars("train/loss")) == results["methods"]["sft"]["steps"]


def results_log(folder: Path) -> list[dict]:
    return json.loads((folder / "done.json").read_text())["log"]
