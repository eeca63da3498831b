"""Checks that the processes of a launcher have joined one process group before training."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


A_DAY = timedelta(days=1)
NO_FSDP = (
    "FSDP was requested, but accelerate does not support it on CPUs: it would run plain DDP instead, or processes "
    "that do not average their gradients. Use multi_cpu or zero3 of recipes/accelerate_configs."
)


def launched_processes() -> int:
    """Return the number of processes of the launcher (WORLD_SIZE of torchrun and accelerate); 1 without a launcher."""
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}; it must be the number of processes.") from None


def launched_with(engine: str) -> bool:
    """Return whether accelerate's launcher requested an engine, "FSDP" or "DEEPSPEED"."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1")


def join_on_cpu() -> None:
    """Join the launcher's processes on CPUs if the machine has no accelerator; otherwise do nothing.

    Meant for commands, before training arguments are created. All accelerate configurations of gflowtrl expect this.
    Trainers read `ACCELERATE_USE_CPU`; DeepSpeed has its own variable.
    """
    if launched_processes() < 2 or torch.accelerator.is_available() or launched_with("FSDP"):
        return
    if launched_with("DEEPSPEED"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        PartialState(backend="gloo", timeout=A_DAY)
    else:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        PartialState(cpu=True, timeout=A_DAY)


def check_processes() -> None:
    """Check that all launched processes have joined, with the engine that the launcher requested.

    Otherwise each process would train alone and write to the same output folder, gradients would not be averaged, or
    plain DDP would run instead of FSDP.

    Raises:
        ValueError: the launcher and the processes disagree; the message contains the remedy.
    """
    state, launched = PartialState(), launched_processes()
    remedy = "on a machine without an accelerator set use_cpu=True, or ddp_backend='gloo' for DeepSpeed"
    plain = state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if launched > 1 and plain and launched_with("FSDP") and not torch.accelerator.is_available():
        raise ValueError(NO_FSDP)
    if state.num_processes < launched:  # other launchers (TPU, MPI) do not set WORLD_SIZE
        raise ValueError(
            f"The launcher started {launched} processes (WORLD_SIZE), but this process has joined only "
            f"{state.num_processes}: each would train alone and write to the same folder. Join them ({remedy}), or "
            f"unset WORLD_SIZE if no launcher is in use."
        )
    if launched > 1 and state.distributed_type == DistributedType.NO:
        raise ValueError(
            f"The {launched} processes have joined, but accelerate treats each as a separate training, so gradients "
            f"would not be averaged. Join them for accelerate too: {remedy}."
        )
