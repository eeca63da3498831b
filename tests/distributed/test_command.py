"""`gflowtrl train --num_processes 2` starts two processes."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.pipeline.micro import micro_settings


slow = pytest.mark.slow


@pytest.mark.parametrize("engine", ["", pytest.param("multi_cpu", marks=slow), pytest.param("zero2", marks=slow)])
def test_the_command_starts_its_processes(engine, tmp_path):
    settings = micro_settings(tmp_path / "out", name="micro")
    settings["sft"]["max_steps"] = settings["gflownet"]["max_steps"] = 2
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "gflowtrl", "train", "--config", tmp_path / "micro.yaml", "--num_processes", "2"]
    command += ["--accelerate_config", engine] if engine else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    methods = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert methods["gflownet"]["rows_per_step"] == 2 * settings["gflownet"]["per_device_train_batch_size"]
    assert "gflowtrl train --config" in ran.stdout  # the hint names the command of the user
