"""A NaN in one of two processes stops both with the same error."""

import json

import pytest

from .launch import launch


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_both_processes_stop_with_the_same_error(engine, tmp_path):
    launch(engine, tmp_path, ["-m", "tests.distributed.finite_worker", engine, str(tmp_path)], timeout=600)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["processes"] == 2 and first["split"] == (engine != "ddp")
    assert "stopped: at step 3 the loss was not finite" in first["loss"]
    assert first["checkpoints"] == ["checkpoint-2"]
    assert "cannot be evaluated: its log-probabilities are NaN" in first["evaluation"]
    assert first["save"].startswith("The model was not saved: its weight '")
    assert not (tmp_path / "saved").exists()
