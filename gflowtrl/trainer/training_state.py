"""What a checkpoint holds beside the model and the optimizer: the sampler's state, and APAO's prefix weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from gflowtrl.finite import check_tensors
from gflowtrl.losses.prefix_weights import PrefixWeights
from gflowtrl.samplers import Sampler


_STEM = "sampler"
PREFIX_FILE = "prefix_weights.safetensors"


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
        sampler.load_state_dict(_read(file))
        return
    # With as many processes, one whose state was empty has no file, but then none of the others is of another number.
    known = {_file(directory, number, processes).name for number in range(processes)}
    others = sorted({path.name for path in Path(directory).glob(f"{_STEM}*.safetensors")} - known)
    if others:
        raise ValueError(
            f"{directory} holds the sampler's state as {', '.join(others)}, which is not that of {processes} "
            f"process(es). Resume with the number of processes that wrote it, or delete these files to let the "
            f"sampler begin anew."
        )


def _read(file: Path) -> dict[str, Tensor]:
    tensors = load_file(file)
    check_tensors(tensors, file)
    return tensors


def _file(directory: str | os.PathLike, process: int, processes: int) -> Path:
    suffix = "" if processes == 1 else f"-{process}-of-{processes}"
    return Path(directory, f"{_STEM}{suffix}.safetensors")


def save_prefix_weights(weights: Mapping[str, PrefixWeights], directory: str | os.PathLike) -> None:
    """Into a checkpoint, those of every loss; no file where there are none."""
    state = {f"{name}.{key}": value for name, own in weights.items() for key, value in own.state_dict().items()}
    if state:
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_file(state, Path(directory, PREFIX_FILE))


def load_prefix_weights(weights: Mapping[str, PrefixWeights], directory: str | os.PathLike) -> None:
    """What `save_prefix_weights` wrote; without a file they stay as new."""
    file = Path(directory, PREFIX_FILE)
    state = _read(file) if file.is_file() else {}
    for name, own in weights.items():
        if f"{name}.log_weights" in state:
            own.load_state_dict({"log_weights": state[f"{name}.log_weights"]})
