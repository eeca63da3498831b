"""Stages: done once, shared where inputs agree."""

import pytest

from gflowtrl.pipeline.stage import Workshop


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path, quiet=True)


def test_work_is_done_once(workshop):
    calls = []

    def work(folder):
        calls.append(folder)
        return {"value": 3}

    first = workshop.stage("x", {"a": 1}).run("", work)
    second = workshop.stage("x", {"a": 1}).run("", work)
    assert first == second
    assert first["value"] == 3
    assert len(calls) == 1


def test_other_inputs_are_another_stage(workshop):
    stages = [workshop.stage(name, inputs) for name in "xy" for inputs in ({"a": 1}, {"a": 2}, {"b": 1})]
    assert len({stage.folder for stage in stages}) == 6


def test_failed_work_is_not_done_and_its_time_counts(workshop, monkeypatch):
    clock = iter([0.0, 5.0, 100.0, 102.0])
    monkeypatch.setattr("gflowtrl.pipeline.stage.time.monotonic", lambda: next(clock))

    def interrupted(folder):
        raise KeyboardInterrupt

    stage = workshop.stage("x", {})
    with pytest.raises(KeyboardInterrupt):
        stage.run("", interrupted)
    assert not stage.done
    assert stage.run("", lambda folder: {})["seconds"] == 7.0
    assert not [file for file in stage.folder.iterdir() if file.name.startswith(".")]
