"""The sampler's state in a checkpoint: one safetensors file for every process."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from gflowtrl.samplers import Sampler


_STEM = "sampler"


def save_sampler(sampler: Sampler, directory: str | os.PathLike, process: int, processes: int) -> None:
    """Write `sampler.state_dict()` into a checkpoint, each process its own; no file for an empty state."""
    state = sampler.state_dict()
    if state:
        # A process can arrive here before the first one has made the folder.
        Path(directory).mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
        save_file(tensors, _file(directory, process, processes))


def load_sampler(sampler: Sampler, directory: str | os.PathLike, process: int, processes: int) -> None:
    """Restore what `save_sampler` wrote; without a file the sampler stays as it is, as new.

    Raises:
        ValueError: the checkpoint is of another number of processes, or (from the sampler) of another sampler.
    """
    file = _file(directory, process, processes)
    if file.is_file():
        sampler.load_state_dict(load_file(file))
        return
    saved = sorted(path.name for path in Path(directory).glob(f"{_STEM}*.safetensors"))
    # With as many processes, one whose state was empty has no file, but then none of the others is of another number.
    others = [name for name in saved if not _is_of(name, processes)]
    if others:
        raise ValueError(
            f"{directory} holds the sampler's state as {', '.join(others)}, which is not that of {processes} "
            f"process(es). Resume with the number of processes that wrote it, or delete these files to let the "
            f"sampler begin anew."
        )


def _file(directory: str | os.PathLike, process: int, processes: int) -> Path:
    suffix = "" if processes == 1 else f"-{process}-of-{processes}"
    return Path(directory, f"{_STEM}{suffix}.safetensors")


def _is_of(name: str, processes: int) -> bool:
    return name in {_file("", process, processes).name for process in range(processes)}
