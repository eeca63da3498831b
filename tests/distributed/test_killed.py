"""After `kill -9` at any moment, the same command has the results of an uninterrupted run."""

import json
import os
import shutil

import pytest
import yaml

from tests.pipeline.micro import micro_settings
from tests.processes import run_python

from .killed import MOMENTS
from .launch import ENGINES, ROOT, launch


def settings(folder, **options) -> dict:
    recipe = micro_settings(folder / "out")
    recipe["gflownet"] |= {
        "loss_type": ["sft", "trajectory_balance"], "num_train_epochs": 3, "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16, **options,
    }  # fmt: skip
    recipe["sampler"] = {"ground_truth": 1, "replay": 2}
    recipe["sft"] |= {"use_cpu": True, "num_train_epochs": 1}
    return recipe | {"stages": ["teacher", "sft", "gflownet"]}


def command(folder, recipe: dict, module: str = "example") -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "micro.yaml").write_text(yaml.safe_dump(recipe))
    return ["-m", f"tests.distributed.{module}", "--config", str(folder / "micro.yaml")]


def results(folder) -> dict:
    methods = json.loads((folder / "out" / "results.json").read_text())["methods"]
    return {name: entry["metrics"] for name, entry in methods.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp("killed") / "whole"
    ran = run_python(command(folder, settings(folder, use_cpu=True)), ROOT)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


def copy_earlier_stages(whole, folder):
    """Copy the stages before the GFlowNet stage."""
    (folder / "out").mkdir(parents=True)
    for stage in (whole / "out").iterdir():
        if stage.name.startswith(("teacher-", "sft-", "test-teacher-", "test-sft-")):
            shutil.copytree(stage, folder / "out" / stage.name)


#: One moment during a checkpoint, and the first and last of the other moments. The rest are slow tests.
OFTEN = ("training", "state", "test")


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=[] if moment in OFTEN else [pytest.mark.slow]) for moment in MOMENTS]
)
def test_one_process(moment, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    copy_earlier_stages(uninterrupted, folder)
    recipe = settings(folder, use_cpu=True)
    killed = run_python(command(folder, recipe, "killed"), ROOT, environment={"GFLOWTRL_KILL": moment})
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert not (folder / "out" / "results.json").exists()
    again = run_python(command(folder, recipe), ROOT)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "[sft]" in again.stdout and "already done" in again.stdout
    assert ("Continuing from" in again.stdout) == (moment not in ("test",))
    assert results(folder) == results(uninterrupted)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The kill happens while a process writes its part of a checkpoint."""
    recipes = {name: settings(tmp_path / name, **ENGINES["zero2"][1]) for name in ("whole", "run")}
    for recipe in recipes.values():
        recipe["sft"] |= {"use_cpu": False, **ENGINES["zero2"][1]}
    launch("zero2", tmp_path, command(tmp_path / "whole", recipes["whole"]))
    copy_earlier_stages(tmp_path / "whole", tmp_path / "run")
    os.environ["GFLOWTRL_KILL"] = "state"
    try:
        with pytest.raises(AssertionError, match="SIGKILL"):
            launch("zero2", tmp_path, command(tmp_path / "run", recipes["run"], "killed"))
    finally:
        del os.environ["GFLOWTRL_KILL"]
    printed = launch("zero2", tmp_path, command(tmp_path / "run", recipes["run"]))
    assert printed.count("Continuing from") == 1
    assert results(tmp_path / "run") == results(tmp_path / "whole")
