"""Run examples/gflowgr_amazon.py and kill it with SIGKILL at the moment in GFLOWTRL_KILL."""

import os
import runpy
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from gflowtrl import GFlowNetTrainer
from gflowtrl.pipeline import evaluation

from .launch import ROOT


def no_file(*args: Any) -> None:
    return None


#: moment -> owner and name of a function, the number of the call that kills, and the file that is half written then
MOMENTS = {
    "training": (GFlowNetTrainer, "training_step", 30, no_file),
    "model": (GFlowNetTrainer, "_save", 2, lambda _, folder, *__: Path(folder, "model.safetensors")),
    "optimizer": (torch, "save", 2, lambda _, file: file if str(file).endswith("optimizer.pt") else None),
    "state": (TrainerState, "save_to_json", 2, lambda _, file: file),
    "evaluation": (GFlowNetTrainer, "prediction_step", 5, no_file),
    "test": (evaluation, "rank_both", 1, no_file),
}


def arm(moment: str) -> None:
    owner, name, count, file_of = MOMENTS[moment]
    original, calls = getattr(owner, name), []

    def call_or_kill(*args: Any, **kwargs: Any) -> Any:
        file = file_of(*args)
        if file is not None or file_of is no_file:
            calls.append(args)
        if len(calls) < count:
            return original(*args, **kwargs)
        if file is not None:
            original(*args, **kwargs)
            os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, call_or_kill)


if __name__ == "__main__":
    arm(os.environ["GFLOWTRL_KILL"])
    runpy.run_path(str(ROOT / "examples" / "gflowgr_amazon.py"), run_name="__main__")
