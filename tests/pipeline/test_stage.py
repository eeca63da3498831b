"""Stages: done once, shared where inputs agree."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gflowtrl.cli.train import main
from gflowtrl.pipeline.lock import sole_run
from gflowtrl.pipeline.stage import RunContext

from .micro import micro_settings


@pytest.fixture
def context(tmp_path):
    return RunContext(tmp_path, quiet=True)


def test_work_is_done_once(context):
    calls = []

    def work(folder):
        calls.append(folder)
        return {"value": 3}

    first = context.stage("x", {"a": 1}).run("", work)
    second = context.stage("x", {"a": 1}).run("", work)
    assert first == second
    assert first["value"] == 3
    assert len(calls) == 1


def test_other_inputs_are_another_stage(context):
    stages = [context.stage(name, inputs) for name in "xy" for inputs in ({"a": 1}, {"a": 2}, {"b": 1})]
    assert len({stage.folder for stage in stages}) == 6


def test_failed_work_is_not_done_and_its_time_counts(context, monkeypatch):
    clock = iter([0.0, 5.0, 100.0, 102.0])
    monkeypatch.setattr("gflowtrl.pipeline.stage.time.monotonic", lambda: next(clock))

    def interrupted(folder):
        raise KeyboardInterrupt

    stage = context.stage("x", {})
    with pytest.raises(KeyboardInterrupt):
        stage.run("", interrupted)
    assert not stage.done
    assert stage.run("", lambda folder: {})["seconds"] == 7.0
    assert not [file for file in stage.folder.iterdir() if file.name.startswith(".")]


def test_lines_number_the_stages_and_estimate_what_is_left(tmp_path, capsys, monkeypatch):
    """Plan a, b, c with costs 1, 2, 4; a took 60 s, b 180 s: 240 s for costs of 3, so c takes about 320 s."""
    clock = iter([0.0, 60.0, 100.0, 280.0, 300.0, 301.0, 400.0, 410.0])
    monkeypatch.setattr("gflowtrl.pipeline.stage.time.monotonic", lambda: next(clock))
    context = RunContext(tmp_path, plan={"a": 1, "b": 2, "c": 4})
    for name in ("a", "b", "other", "c"):
        context.stage(name, {}).run("work", lambda folder: {})
    assert capsys.readouterr().out.splitlines() == [
        "[a] stage 1 of 3: work", "[a] finished in 60 s; about 6 min left",
        "[b] stage 2 of 3: work", "[b] finished in 180 s; about 5 min left",
        "[other] work", "[other] finished in 1 s",
        "[c] stage 3 of 3: work", "[c] finished in 10 s",
    ]  # fmt: skip
    again = RunContext(tmp_path, plan={"a": 1, "b": 2, "c": 4})
    again.stage("a", {}).run("work", lambda folder: {})
    (tmp_path / again.stage("b", {}).folder.name / "done.json").unlink()
    monkeypatch.setattr("gflowtrl.pipeline.stage.time.monotonic", iter([0.0, 0.0]).__next__)
    again.stage("b", {}).run("work", lambda folder: {})  # its earlier attempt counts
    assert "[b] finished in 180 s; about 5 min left" in capsys.readouterr().out


def test_a_stage_within_another_one_is_not_a_stage_of_the_plan(tmp_path, capsys):
    """A reward of c fits its own teacher, a, long after the planned a."""
    context = RunContext(tmp_path, plan={"a": 1, "b": 2, "c": 4})
    context.stage("a", {}).run("work", lambda folder: {})

    def work(folder):
        context.stage("a", {"own": 1}).run("own", lambda folder: {})
        return {}

    context.stage("c", {}).run("work", work)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["[c] stage 3 of 3: work", "[a] own", "[a] finished in 0 s", "[c] finished in 0 s"]


def finish(context, name: str = "x", calls: list | None = None):
    """A stage that leaves the files of a model."""

    def work(folder):
        if calls is not None:
            calls.append(name)
        (folder / "model").mkdir(exist_ok=True)
        save_file({"a": torch.zeros(9)}, folder / "model" / "model.safetensors")
        (folder / "model" / "config.json").write_text('{"a": 1}')
        (folder / "model" / "README.md").write_text("a card")
        return {}

    stage = context.stage(name, {})
    stage.run("", work)
    return stage


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model/model.safetensors", "is missing"),
        ("model/model.safetensors", "is not a whole safetensors file"),
        ("model/config.json", "is missing"),
        ("model/config.json", "is not valid JSON"),
        ("done.json", "is not valid JSON"),
    ],
)
def test_a_finished_stage_that_is_damaged_is_named_and_redone_on_request(tmp_path, name, damage):
    file = finish(RunContext(tmp_path, quiet=True)).folder / name
    whole = file.read_bytes()
    if damage == "is missing":
        file.unlink()
    else:
        file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"The stage x is finished, but .*{name} {damage}.*add --redo x"):
        finish(RunContext(tmp_path, quiet=True))
    calls, again = [], RunContext(tmp_path, quiet=True, redo=["x"])
    finish(again, calls=calls)
    finish(again, calls=calls)
    finish(again, "y", calls)
    assert calls == ["x", "y"] and (name == "done.json" or file.read_bytes() == whole)


@pytest.mark.parametrize("name", ["done.json", "own.safetensors"])
def test_results_of_a_finished_stage_that_were_changed_are_named(tmp_path, name):
    """A valid file with other values would become a wrong report, or an error that names no file."""

    def work(folder):
        save_file({"recall": torch.zeros(9)}, folder / "own.safetensors")
        return {"metrics": {"recall": 0.0, "ks": (5, 10)}, "log": [{"loss": float("nan")}]}

    def stage():
        return RunContext(tmp_path, quiet=True).stage("x", {})

    first = stage()
    first.run("", work)
    file = first.folder / name
    whole = file.read_bytes()
    if name == "done.json":
        file.write_text(file.read_text().replace('"recall": 0.0', '"recall": 0.5'))
    else:
        save_file({"recall": torch.ones(9)}, file)
    assert file.read_bytes() != whole
    with pytest.raises(ValueError, match=rf"{name} does not have its checksum. .*add --redo x"):
        stage().run("", work)
    file.write_bytes(whole)
    assert stage().run("", work)["metrics"] == {"recall": 0.0, "ks": [5, 10]}


def test_a_stage_of_an_earlier_version_has_no_checksums(tmp_path):
    file = finish(RunContext(tmp_path, quiet=True)).folder / "done.json"
    content = json.loads(file.read_text())
    del content["checksums"]
    file.write_text(json.dumps(content))
    calls = []
    finish(RunContext(tmp_path, quiet=True), calls=calls)
    assert not calls


def test_what_no_run_reads_may_be_gone(tmp_path):
    stage = finish(RunContext(tmp_path, quiet=True))
    for name in ("inputs.json", "seconds.json", "model/README.md"):
        (stage.folder / name).unlink()
    calls = []
    finish(RunContext(tmp_path, quiet=True), calls=calls)
    assert not calls


HOLD = """
import sys, time
from gflowtrl.pipeline.lock import sole_run
with sole_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_run_in_a_folder_says_so_and_a_killed_one_leaves_it_free(tmp_path, capsys):
    recipe = tmp_path / "micro.yaml"
    recipe.write_text(yaml.safe_dump(micro_settings(tmp_path / "out", stages=["teacher"])))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"held\n"
            said = rf"error: .*out is in use by process {first.pid} on .*choose another output_dir"
            for more in ([], ["--num_processes", "2"]):
                assert main(["--config", str(recipe), *more]) == 2
                assert re.search(said, capsys.readouterr().err)
        finally:
            first.kill()
    assert not list((tmp_path / "out").glob("teacher-*"))
    assert main(["--config", str(recipe)]) == 0
    assert list((tmp_path / "out").glob("teacher-*/done.json"))
    with (
        sole_run(tmp_path / "out"),
        pytest.raises(ValueError, match=rf"process {os.getpid()} "),
        sole_run(tmp_path / "out"),
    ):
        pass
    with sole_run(tmp_path / "out"):
        pass
