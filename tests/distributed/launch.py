"""Start a module in two processes with `accelerate launch` and the library's configurations."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import yaml


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
PROCESSES = 2
#: engine -> (configuration, training arguments that it needs on CPUs)
ENGINES = {
    "ddp": ("multi_gpu", {"use_cpu": True}),
    "zero1": ("zero1", {"ddp_backend": "gloo"}),
    "zero2": ("zero2", {"ddp_backend": "gloo"}),
    "zero3": ("zero3", {"ddp_backend": "gloo"}),
    "fsdp2": ("fsdp2", {}),
}


def launch(engine: str, folder: Path, command: list[str], timeout: float = 1200) -> str:
    """Run `python COMMAND` in two processes and return their output.

    They must end without an error within `timeout` seconds. The first start with DeepSpeed compiles an extension,
    which takes minutes on a busy machine.
    """
    config = yaml.safe_load((CONFIGS / f"{ENGINES[engine][0]}.yaml").read_text())
    config["num_processes"] = PROCESSES
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{engine}.yaml"
    file.write_text(yaml.safe_dump(config))
    log = folder / f"{engine}.log"
    with log.open("w") as output:
        job = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--dynamo_backend", "no",
             *command],
            cwd=ROOT, env=environment(engine), stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status = job.wait(timeout)
        except subprocess.TimeoutExpired:
            # The workers are killed too: a hanging one would use a core during all later tests.
            for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                process.kill()
            status = f"still running after {timeout} s"
    text = log.read_text()
    assert status == 0, f"{status}\n{text[-6000:]}"
    return text


def environment(engine: str) -> dict[str, str]:
    variables = {"OMP_NUM_THREADS": "1"}
    if engine.startswith("zero"):
        variables["DS_ACCELERATOR"] = "cpu"
    if engine == "fsdp2":
        variables["GFLOWTRL_FSDP_ON_CPU"] = "1"
    return {**os.environ, **variables}
