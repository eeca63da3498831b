"""What a checkpoint holds besides model and optimizer: the sampler's state, and APAO's prefix weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gflowtrl.finite import check_tensors
from gflowtrl.losses.prefix_weights import PrefixWeights
from gflowtrl.policy.heads import has_flow_heads
from gflowtrl.samplers import Sampler

from .finite_steps import HEADS_FILE
from .resume import WEIGHTS


_STEM = "sampler"
PREFIX_FILE = "prefix_weights.safetensors"


def own_state_files(
    model: nn.Module,
    sampler: Sampler,
    weights: Mapping[str, PrefixWeights],
    directory: str | os.PathLike,
    process: int,
    processes: int,
) -> list[str]:
    """Names of what a trainer has written into its checkpoint besides transformers' files; heads lie where whole
    weights do (an engine that writes shards keeps both in them)."""
    folder, names = Path(directory), []
    if has_flow_heads(model) and any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        names.append(HEADS_FILE)
    if weights:
        names.append(PREFIX_FILE)
    own = sampler_file(folder, process, processes)
    # A state of another number of processes has an error of its own.
    # An empty state was not written by earlier versions, and nothing of it can be lost.
    if own.is_file() or (sampler.state_dict() and not any(folder.glob(f"{_STEM}*.safetensors"))):
        names.append(own.name)
    return names


def keeps_state(sampler: Sampler) -> bool:
    """Whether a sampler has a state of its own to save (its class replaces `state_dict`), empty as it may be."""
    return type(sampler).state_dict is not Sampler.state_dict


def save_sampler(sampler: Sampler, directory: str | os.PathLike, process: int, processes: int) -> None:
    """Write `sampler.state_dict()` into a checkpoint, each process its own; no file for a sampler that keeps none.

    An empty state is written too: so a file that is missing later was lost.
    """
    if keeps_state(sampler):
        # A process can arrive here before the first one has made the folder.
        Path(directory).mkdir(parents=True, exist_ok=True)
        state = sampler.state_dict()
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
        save_file(tensors, sampler_file(directory, process, processes))


def load_sampler(sampler: Sampler, directory: str | os.PathLike, process: int, processes: int) -> None:
    """Restore what `save_sampler` wrote.

    Raises:
        ValueError: there is no file for a sampler that keeps a state, the checkpoint is of another number of
            processes, or (from the sampler) of another sampler.
    """
    file = sampler_file(directory, process, processes)
    if file.is_file():
        state = _read(file)
        if state or sampler.state_dict():
            sampler.load_state_dict(state)
        return
    others = sorted(path.name for path in Path(directory).glob(f"{_STEM}*.safetensors"))
    if others:
        raise ValueError(
            f"{directory} holds the sampler's state as {', '.join(others)}, which is not that of {processes} "
            f"process(es). Resume with the number of processes that wrote it."
        )
    if sampler.state_dict():
        raise ValueError(
            f"{directory} lacks {file.name}, the state of {type(sampler).__name__}: it was written with another "
            f"sampler, or the file was lost. Resume with the sampler that wrote it."
        )


def _read(file: Path) -> dict[str, Tensor]:
    tensors = load_file(file)
    check_tensors(tensors, file)
    return tensors


def sampler_file(directory: str | os.PathLike, process: int, processes: int) -> Path:
    suffix = "" if processes == 1 else f"-{process}-of-{processes}"
    return Path(directory, f"{_STEM}{suffix}.safetensors")


def save_prefix_weights(weights: Mapping[str, PrefixWeights], directory: str | os.PathLike) -> None:
    """Into a checkpoint, those of every loss; no file where no loss has any. An empty state is written too."""
    state = {f"{name}.{key}": value for name, own in weights.items() for key, value in own.state_dict().items()}
    if weights:
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_file(state, Path(directory, PREFIX_FILE))


def load_prefix_weights(weights: Mapping[str, PrefixWeights], directory: str | os.PathLike) -> None:
    """What `save_prefix_weights` wrote.

    Raises:
        ValueError: there is no file, or it is of other losses.
    """
    file = Path(directory, PREFIX_FILE)
    if not weights and not file.is_file():
        return
    state = _read(file) if file.is_file() else {}
    saved = {key.rpartition(".")[0] for key in state}
    lost = {name for name, own in weights.items() if name not in saved and own.state_dict()}
    if lost or saved - weights.keys() or not file.is_file():
        raise ValueError(
            f"{file} {f'is of {sorted(saved)}' if file.is_file() else 'is missing'}, but the prefix weights of "
            f"{sorted(weights)} are to be restored. Resume with the losses that wrote the checkpoint."
        )
    for name in saved:
        weights[name].load_state_dict({"log_weights": state[f"{name}.log_weights"]})
