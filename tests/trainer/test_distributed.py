"""One process and two processes give the same numbers for the same global batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gflowtrl import Recommender

from .distributed_training import run


@pytest.mark.slow  # tests/distributed covers every engine
def test_two_processes_equal_one(tmp_path):
    one = run(tmp_path / "one", batch_size=8)
    folder = tmp_path / "two"
    folder.mkdir()
    launch = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    )
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch.split(),
         "--module", "tests.trainer.distributed_training", str(folder)],
        check=True, timeout=240, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for two in ranks:
        assert (two["processes"], two["wrapper"]) == (2, "DistributedDataParallel") and "MULTI" in two["distributed"]
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert two["weight"] == pytest.approx(one["weight"], rel=1e-4, abs=1e-4)
        assert two["evaluation"] == pytest.approx(one["evaluation"])
    assert ranks[0]["rewards"] == pytest.approx(one["rewards"], rel=1e-4)
    assert ranks[0]["late"] == one["late"] == [None, 1.0, None]
    assert ranks[0]["log_z"] == pytest.approx(one["log_z"], rel=1e-4, abs=1e-6)
    history = [["i010", "twin"]]
    pairs = zip(
        *(Recommender.from_pretrained(d / "model").recommend(history)[0] for d in (tmp_path / "one", folder)),
        strict=True,
    )
    assert all(a.item == b.item and a.log_prob == pytest.approx(b.log_prob, rel=1e-3) for a, b in pairs)
