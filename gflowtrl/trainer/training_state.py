"""State that gflowtrl adds to a checkpoint: the sampler's state, APAO's prefix weights and a moving reference."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gflowtrl.files import read_tensors, reading
from gflowtrl.finite import check_tensors
from gflowtrl.losses.prefix_weights import PrefixWeights
from gflowtrl.policy.heads import has_flow_heads
from gflowtrl.samplers import Sampler

from .finite_steps import HEADS_FILE
from .resume import WEIGHTS


_STEM = "sampler"
PREFIX_FILE = "prefix_weights.safetensors"
REFERENCE_FILE = "reference.safetensors"


def extra_state_files(
    model: nn.Module,
    sampler: Sampler,
    weights: Mapping[str, PrefixWeights],
    directory: str | os.PathLike,
    process: int,
    processes: int,
) -> list[str]:
    """Return the names of the files that a trainer adds to those of transformers in a checkpoint.

    Flow heads have a file if the folder has full weights; an engine that writes shards stores the heads in them.
    """
    folder, names = Path(directory), []
    if has_flow_heads(model) and any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        names.append(HEADS_FILE)
    if weights:
        names.append(PREFIX_FILE)
    file = sampler_file(folder, process, processes)
    # The state of another number of processes has a separate error message.
    # Earlier versions did not write an empty state, in which nothing can be lost.
    if file.is_file() or (sampler.state_dict() and not any(folder.glob(f"{_STEM}*.safetensors"))):
        names.append(file.name)
    return names


def save_sampler(sampler: Sampler, directory: str | os.PathLike, process: int, processes: int) -> None:
    """Write `sampler.state_dict()` of each process to a checkpoint; no file for a sampler class without state.

    An empty state is written too, so that a missing file means that the state was lost.
    """
    if type(sampler).state_dict is not Sampler.state_dict:
        # A process can get here before the main process has created the folder.
        Path(directory).mkdir(parents=True, exist_ok=True)
        state = sampler.state_dict()
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
        save_file(tensors, sampler_file(directory, process, processes))


def load_sampler(sampler: Sampler, directory: str | os.PathLike, process: int, processes: int) -> None:
    """Restore the state written by `save_sampler`.

    Raises:
        ValueError: the file of a sampler with state is missing or damaged, or the checkpoint was written by another
            number of processes or by another sampler.
    """
    file = sampler_file(directory, process, processes)
    if file.is_file():
        state = _read(file)
        if state or sampler.state_dict():
            with loading_state(file):
                sampler.load_state_dict(state)
        return
    others = sorted(path.name for path in Path(directory).glob(f"{_STEM}*.safetensors"))
    if others:
        raise ValueError(
            f"{directory} contains the sampler's state in {', '.join(others)}, which is not the state of {processes} "
            f"process(es). Resume with the number of processes that wrote it."
        )
    if sampler.state_dict():
        raise ValueError(
            f"{directory} lacks {file.name}, the state of {type(sampler).__name__}: it was written with another "
            f"sampler, or the file was lost. Resume with the sampler that wrote it."
        )


def _read(file: Path) -> dict[str, Tensor]:
    tensors = read_tensors(file)
    check_tensors(tensors, file)
    return tensors


@contextmanager
def loading_state(file: Path) -> Iterator[None]:
    """Context manager around `load_state_dict`: its errors name the file of the state."""
    with reading(file, "the state of this training"):
        try:
            yield
        except ValueError as error:  # has its own remedy
            raise ValueError(f"{file}: {error}") from None


def sampler_file(directory: str | os.PathLike, process: int, processes: int) -> Path:
    suffix = "" if processes == 1 else f"-{process}-of-{processes}"
    return Path(directory, f"{_STEM}{suffix}.safetensors")


def save_prefix_weights(weights: Mapping[str, PrefixWeights], directory: str | os.PathLike) -> None:
    """Write the prefix weights of all losses to a checkpoint, empty states too; no file without such losses."""
    state = {f"{name}.{key}": value for name, each in weights.items() for key, value in each.state_dict().items()}
    if weights:
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_file(state, Path(directory, PREFIX_FILE))


def load_prefix_weights(weights: Mapping[str, PrefixWeights], directory: str | os.PathLike) -> None:
    """Restore the state written by `save_prefix_weights`.

    Raises:
        ValueError: the file is missing, or belongs to other losses.
    """
    file = Path(directory, PREFIX_FILE)
    if not weights and not file.is_file():
        return
    state = _read(file) if file.is_file() else {}
    saved = {key.rpartition(".")[0] for key in state}
    lost = {name for name, each in weights.items() if name not in saved and each.state_dict()}
    if lost or saved - weights.keys() or not file.is_file():
        raise ValueError(
            f"{file} {f'has the prefix weights of {sorted(saved)}' if file.is_file() else 'is missing'}, but those of "
            f"{sorted(weights)} are needed. Resume with the losses that wrote the checkpoint."
        )
    with loading_state(file):
        for name in saved:
            weights[name].load_state_dict({"log_weights": state[f"{name}.log_weights"]})


def save_reference(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the parameters of a reference model that moves during training to a checkpoint."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.named_parameters()}
    save_file(state, Path(directory, REFERENCE_FILE))


@torch.no_grad()
def load_reference(model: nn.Module, directory: str | os.PathLike) -> None:
    """Restore the parameters written by `save_reference`.

    Raises:
        ValueError: they are those of another model.
    """
    file, parameters = Path(directory, REFERENCE_FILE), dict(model.named_parameters())
    state = _read(file)
    if {name: value.shape for name, value in state.items()} != {n: value.shape for n, value in parameters.items()}:
        raise ValueError(
            f"{file} has the weights of another model than the reference. Resume with the same ref_model."
        )
    for name, value in parameters.items():
        value.copy_(state[name])
