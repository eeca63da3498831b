"""Processes that are not in one process group refuse to train."""

import subprocess
import sys

import pytest
import torch
import yaml
from accelerate import PartialState

from gflowtrl import GFlowNetConfig
from gflowtrl.cli.train import main
from gflowtrl.pipeline.stage import RunContext
from gflowtrl.trainer import processes
from tests.pipeline.micro import micro_settings

from .launch import CONFIGS, ROOT, environment


on_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")


@on_cpu
def test_multi_cpu_starts_two_processes_that_must_be_in_one_group():
    ran = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "multi_cpu.yaml",
         "-m", "tests.distributed.counted"],
        cwd=ROOT, env=environment("ddp"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [line for line in ran.stdout.splitlines() if line.startswith("[")]
    alone = [line for line in lines if line.startswith("[]")]
    assert len(alone) == 2 and all(
        "started 2 processes (WORLD_SIZE), but this process has joined only 1" in line for line in alone
    )
    apart = [line for line in lines if line.startswith("['ddp_backend']")]
    assert len(apart) == 2 and all("gradients would not be averaged" in line for line in apart)
    assert lines.count("['use_cpu']: 2 DistributedType.MULTI_CPU") == 2


def test_no_configuration_has_the_type_that_starts_a_single_process():
    kinds = {file.stem: yaml.safe_load(file.read_text())["distributed_type"] for file in CONFIGS.glob("*.yaml")}
    assert "MULTI_CPU" not in kinds.values() and kinds["multi_cpu"] == "MULTI_GPU"


def test_a_single_process_refuses_a_launcher_of_two(tmp_path, monkeypatch):
    PartialState()
    GFlowNetConfig(str(tmp_path), use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for build in (processes.check_processes, lambda: RunContext(tmp_path)):
        with pytest.raises(ValueError, match=r"started 2 processes .*, but this process has joined only 1.*use_cpu"):
            build()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'many'"):
        processes.check_processes()


@on_cpu
def test_fsdp_on_cpus_is_refused(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "micro.yaml"
    recipe.write_text(yaml.safe_dump(micro_settings(tmp_path / "out")))
    assert main(["--config", str(recipe), "--num_processes", "2", "--accelerate_config", "fsdp2"]) == 2
    assert "accelerate does not support it on CPUs" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"accelerate does not support it on CPUs.*multi_cpu or zero3"):
        processes.check_processes()
