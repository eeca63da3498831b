"""Checks that a checkpoint is complete, so that a resumed training continues as if it had not been interrupted.

The Trainer of transformers resumes without a missing optimizer, scheduler or generator state, and silently restarts
that part of the training. Here the checkpoint is checked before training starts.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import TrainerState

from gflowtrl.checks import at_least, check_number, short_repr
from gflowtrl.compat import OPTIMIZER_NAME, PREFIX_CHECKPOINT_DIR, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from gflowtrl.configuration import check_types
from gflowtrl.files import MISSING, damage_of, read_json, reading


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")
RESTART = "To start a new training from its weights, pass the folder as the model without resume_from_checkpoint."


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the newest complete checkpoint in a folder (the trainer state is written last), or None.

    Only folders named checkpoint-NUMBER count. Those without a readable state are skipped with a warning.
    """
    steps = numbered_checkpoints(folder)
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        try:
            read_state(path)
        except ValueError as error:
            logger.warning(f"{error} This checkpoint is skipped.")
        else:
            return str(path)
    return None


def numbered_checkpoints(folder: str | os.PathLike) -> dict[Path, int]:
    """Return the folders named checkpoint-NUMBER, complete or not, with their numbers. Others belong to the user."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)")
    matches = {path: pattern.fullmatch(path.name) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return {path: int(match[1]) for path, match in matches.items() if match and path.is_dir()}


def remove_checkpoints(folder: str | os.PathLike, limit: int, kept: set[Path]) -> None:
    """Remove the oldest checkpoints until `limit` are left.

    The rotation of transformers would remove any folder whose name starts with "checkpoint-", also a user's copy.

    Args:
        folder: the folder that contains the checkpoints.
        limit: maximum number of checkpoints, including `kept`.
        kept: checkpoints that are never removed.
    """
    steps = numbered_checkpoints(folder)
    oldest_first = sorted(steps, key=lambda path: (path.stat().st_mtime_ns, steps[path]))
    removable = [path for path in oldest_first if path not in kept]
    for path in removable[: max(0, len(steps) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def read_state(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """Read the trainer state, which is written last: a checkpoint with a trainer state is complete.

    Raises:
        ValueError: the state is missing or damaged, or a field has another type than transformers writes; the message
            names the file.
    """
    file = Path(checkpoint, TRAINER_STATE_NAME)
    if not Path(checkpoint).is_dir():
        raise ValueError(f"{checkpoint} is not a folder, so there is no checkpoint to resume from.")
    if damage := damage_of(file):
        raise ValueError(f"{file} {damage}: the checkpoint is incomplete or damaged.")
    state = read_json(file)
    if not (isinstance(state, dict) and "global_step" in state):
        raise ValueError(f"{file} does not contain the state of a training (a global_step): it is damaged.")
    with reading(file, "the state of a training"):
        check_types(TrainerState, {name: _as_whole(name, value) for name, value in state.items()})
        check_number("global_step", state["global_step"], at_least(0))
        for name, kind in (("stateful_callbacks", dict), ("log_history", list)):  # their annotations take others, too
            if not isinstance(state.get(name), kind | None):
                raise ValueError(f"{name} is {short_repr(state[name])}")
    return state


def _as_whole(name: str, value: Any) -> Any:
    """The value of a field of a state; 1.0, as arguments such as `logging_steps` allow it, as a whole number."""
    return int(value) if name.endswith("_steps") and isinstance(value, float) and value.is_integer() else value


def best_so_far(checkpoint: str | os.PathLike, is_loaded: bool) -> str | None:
    """Return the folder of the best checkpoint so far, or None if a training does not look for one.

    It is next to `checkpoint`: the path in the trainer state is that of the time of writing, and the folder may have
    been moved since.

    Args:
        checkpoint: the checkpoint to resume from.
        is_loaded: whether the training ends with the best model (`load_best_model_at_end`).

    Raises:
        ValueError: `is_loaded`, and the best checkpoint or its weights are missing or damaged. The Trainer of
            transformers would go on without it, and end with another model than an uninterrupted training.
    """
    file = Path(checkpoint, TRAINER_STATE_NAME)
    recorded = read_state(checkpoint).get("best_model_checkpoint")
    if not recorded:
        return None
    places = (Path(checkpoint).parent / Path(recorded).name, Path(recorded))
    best = next((path for path in places if path in numbered_checkpoints(path.parent)), None)
    names = [path.name for pattern in WEIGHTS for path in sorted(Path(checkpoint).glob(pattern))]
    damages = [f"{best / name} {damage}" for name in names if best and (damage := damage_of(best / name))]
    if is_loaded and (best is None or damages):
        raise ValueError(
            f"{file} names {short_repr(recorded)} as the best checkpoint so far, but "
            f"{'; '.join(damages) or 'there is no such folder'}. Restore it, remove {checkpoint} to resume from an "
            f"earlier one, or set load_best_model_at_end=False to go on without it."
        )
    return None if best is None else str(best)


def check_resumable(trainer: Trainer, checkpoint: str | os.PathLike, more: list[str]) -> None:
    """Raise an error, on all processes, if a checkpoint lacks a part of the training state.

    Args:
        trainer: the trainer to resume.
        checkpoint: the folder of the checkpoint.
        more: names of other required files.

    Raises:
        ValueError: names the files that are missing or damaged.
    """
    folder = Path(checkpoint)
    read_state(folder)
    engine = _engine_files(trainer, folder)
    weights = [path.name for pattern in WEIGHTS for path in sorted(folder.glob(pattern))]
    damages = {name: damage_of(folder / name) for name in [*engine, *more, *weights] if not (folder / name).is_dir()}
    # Each process checks its own files; a file that is missing on one process stops all of them.
    everyone = gather_object([(engine, damages)])
    engine = {name for names, _ in everyone for name in names}
    damages = {name: damage for _, part in everyone for name, damage in part.items()}
    missing = [name for name, damage in damages.items() if damage == MISSING]
    processes = len(list(folder.glob("rng_state_*.pth"))) or 1
    other = processes != trainer.args.world_size
    if other and any("rng_state" in name for name in missing):
        # Draws do not depend on generators, but dropout does. transformers resumes in the same way.
        logger.warning(
            f"{folder} was written by {processes} process(es), and {trainer.args.world_size} resume from it: dropout "
            f"will draw other random numbers than in an uninterrupted training."
        )
        missing = [name for name in missing if "rng_state" not in name]
    broken = [f"{name} {damage}" for name, damage in damages.items() if damage not in (None, MISSING)]
    if broken:
        raise ValueError(
            f"The checkpoint {folder} is damaged: {'; '.join(broken)}. Resume from another checkpoint. {RESTART}"
        )
    if not missing:
        return
    if {name for name in engine if "rng_state" not in name} <= {*missing}:
        raise ValueError(
            f"{folder} contains only the model (save_only_model=True), not {', '.join(missing)}, so training cannot "
            f"resume from it. {RESTART}"
        )
    if other:
        raise ValueError(
            f"{folder} was written by {processes} process(es), but {trainer.args.world_size} are training, so "
            f"{', '.join(missing)} cannot exist. Resume with the number of processes that wrote it. {RESTART}"
        )
    raise ValueError(
        f"{folder} lacks {', '.join(missing)}: a part of the training would silently start again. Resume from another "
        f"checkpoint. {RESTART}"
    )


def _engine_files(trainer: Trainer, folder: Path) -> list[str]:
    """Return the files of the optimizer, schedule and generators that transformers writes with the engine in use."""
    args, accelerator = trainer.args, trainer.accelerator
    names = ["rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth"]
    plugin = accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    if plugin is None or "scheduler" not in plugin.deepspeed_config:
        names.append(SCHEDULER_NAME)
    if plugin is not None:
        return [*names, *_deepspeed_files(folder, plugin.zero_stage, args.process_index)]
    if getattr(accelerator, "scaler", None) is not None:
        names.append(SCALER_NAME)
    if not trainer.is_fsdp_enabled:
        return [*names, OPTIMIZER_NAME]
    plugin: Any = accelerator.state.fsdp_plugin
    kind = str(plugin.state_dict_type)
    sharded = {"SHARDED": "optimizer_0", "LOCAL": f"optimizer_0_rank{args.process_index}.bin"}
    return [*names, next((name for key, name in sharded.items() if key in kind), "optimizer.bin")]


def _deepspeed_files(folder: Path, stage: int, process: int) -> list[str]:
    """Return DeepSpeed's files: `latest`, which names a folder, and in it (from ZeRO stage 1) the optimizer states."""
    if not (folder / "latest").is_file():
        return ["latest"]
    tag = (folder / "latest").read_text(encoding="utf-8").strip()
    if not stage:
        return [tag]
    paths = sorted((folder / tag).glob(f"*zero_pp_rank_{process}_mp_rank_*_optim_states.pt"))
    names = [str(path.relative_to(folder)) for path in paths]
    return names or [f"{tag}/zero_pp_rank_{process}_mp_rank_00_optim_states.pt"]
