"""Processes that a launcher has started must have found each other before anything is trained."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


A_DAY = timedelta(days=1)
NO_FSDP = (
    "FSDP was asked for, but accelerate has none on CPUs: plain DDP would run in its place, or processes that do not "
    "average their gradients. Choose multi_cpu or zero3 of recipes/accelerate_configs."
)


def launched_processes() -> int:
    """How many processes the launcher says there are (torchrun's and accelerate's WORLD_SIZE); 1 without one."""
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but it is the number of processes.") from None


def asked_for(engine: str) -> bool:
    """Whether accelerate's launcher asked for "FSDP" or "DEEPSPEED"."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1")


def join_on_cpu() -> None:
    """For commands, before any training arguments are made: where a launcher has started several processes on a
    machine without an accelerator, let them find each other on its CPUs, as every one of our configurations of
    accelerate means it. Elsewhere nothing is changed.

    Trainers read `ACCELERATE_USE_CPU`; DeepSpeed has a variable of its own.
    """
    if launched_processes() < 2 or torch.accelerator.is_available() or asked_for("FSDP"):
        return
    if asked_for("DEEPSPEED"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        PartialState(backend="gloo", timeout=A_DAY)
    else:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        PartialState(cpu=True, timeout=A_DAY)


def check_processes() -> None:
    """Refuse processes that do not know of each other, or of the engine that they were started for.

    Without this each would train alone and write into the one output folder, gradients would not be averaged, or
    plain DDP would run in the place of FSDP.

    Raises:
        ValueError: says what the launcher and what the processes think, and the remedy.
    """
    state, launched = PartialState(), launched_processes()
    remedy = "on a machine without an accelerator use_cpu=True joins them, or ddp_backend='gloo' under DeepSpeed"
    plain = state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if launched > 1 and plain and asked_for("FSDP") and not torch.accelerator.is_available():
        raise ValueError(NO_FSDP)
    if state.num_processes < launched:  # other launchers (TPU, MPI) do without WORLD_SIZE
        raise ValueError(
            f"The launcher started {launched} processes (WORLD_SIZE), but this one knows of {state.num_processes}: "
            f"each would train alone and write into the same folder. Let them find each other ({remedy}), or unset "
            f"WORLD_SIZE where no launcher is in use."
        )
    if launched > 1 and state.distributed_type == DistributedType.NO:
        raise ValueError(
            f"The {launched} processes know of each other, but accelerate takes each for a training of its own, so "
            f"that gradients would not be averaged: {remedy}."
        )
