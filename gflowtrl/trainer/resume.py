"""What a checkpoint must hold, so that a training goes on from it as if nothing had happened.

transformers' Trainer goes on without an optimizer, scheduler or generator state that it does not find, as if that part
of the training had only begun. Here the checkpoint is looked at before any time is spent.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from gflowtrl.compat import OPTIMIZER_NAME, PREFIX_CHECKPOINT_DIR, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from gflowtrl.files import MISSING, damage_of


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")
ANEW = "To start a new training from its weights, give the folder as the model and leave resume_from_checkpoint out."


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint of a folder that was written to its end (the state comes last), or None.

    A folder that is not called checkpoint-NUMBER is not one; one without a readable state is left out with a warning.
    """
    steps = numbered_checkpoints(folder)
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        try:
            read_state(path)
        except ValueError as error:
            logger.warning(f"{error} This checkpoint is left out.")
        else:
            return str(path)
    return None


def numbered_checkpoints(folder: str | os.PathLike) -> dict[Path, int]:
    """The folders called checkpoint-NUMBER, complete or not, and their numbers; all others are the user's own."""
    numbered = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)")
    found = {path: numbered.fullmatch(path.name) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}


def remove_checkpoints(folder: str | os.PathLike, limit: int, kept: set[Path]) -> None:
    """Remove the checkpoints that were written first, until `limit` are left.

    transformers' own rotation takes any folder whose name begins with "checkpoint-", a copy that was put aside too.

    Args:
        folder: of the checkpoints.
        limit: how many may stay, those of `kept` included.
        kept: never removed.
    """
    steps = numbered_checkpoints(folder)
    oldest_first = sorted(steps, key=lambda path: (path.stat().st_mtime_ns, steps[path]))
    removable = [path for path in oldest_first if path not in kept]
    for path in removable[: max(0, len(steps) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def read_state(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """The Trainer's state, which is written last: with it a checkpoint is complete.

    Raises:
        ValueError: there is none, or it is not one; the message names the file.
    """
    file = Path(checkpoint, TRAINER_STATE_NAME)
    if not Path(checkpoint).is_dir():
        raise ValueError(f"{checkpoint} is not a folder, so there is no checkpoint to resume from.")
    if damage := damage_of(file):
        raise ValueError(f"{file} {damage}: the checkpoint was not written to its end, or was damaged.")
    state = json.loads(file.read_text(encoding="utf-8"))
    if not (isinstance(state, dict) and isinstance(state.get("global_step"), int)):
        raise ValueError(f"{file} does not hold the state of a training (a global_step): it was damaged.")
    return state


def check_resumable(trainer: Trainer, checkpoint: str | os.PathLike, more: list[str]) -> None:
    """Refuse a checkpoint that lacks a part of the training's state, in all processes alike.

    Args:
        trainer: the one that is to go on.
        checkpoint: its folder.
        more: names of further files that must be there.

    Raises:
        ValueError: names the files that are missing or damaged.
    """
    folder = Path(checkpoint)
    read_state(folder)
    engine = _engine_files(trainer, folder)
    weights = [path.name for pattern in WEIGHTS for path in sorted(folder.glob(pattern))]
    found = {name: damage_of(folder / name) for name in [*engine, *more, *weights] if not (folder / name).is_dir()}
    # Each process looks for files of its own; what one of them lacks stops them all.
    everyone = gather_object([(engine, found)])
    engine = {name for names, _ in everyone for name in names}
    found = {name: damage for _, part in everyone for name, damage in part.items()}
    lacking = [name for name, damage in found.items() if damage == MISSING]
    processes = len(list(folder.glob("rng_state_*.pth"))) or 1
    other = processes != trainer.args.world_size
    if other and any("rng_state" in name for name in lacking):
        # Draws do not depend on generators, dropout does; transformers goes on in the same way.
        logger.warning(
            f"{folder} was written by {processes} process(es), and {trainer.args.world_size} go on from it: dropout "
            f"draws other random numbers than in an undisturbed training."
        )
        lacking = [name for name in lacking if "rng_state" not in name]
    broken = [f"{name} {damage}" for name, damage in found.items() if damage not in (None, MISSING)]
    if broken:
        raise ValueError(f"The checkpoint {folder} is damaged: {'; '.join(broken)}. Resume from another one. {ANEW}")
    if not lacking:
        return
    if {name for name in engine if "rng_state" not in name} <= {*lacking}:
        raise ValueError(
            f"{folder} holds only the model (save_only_model=True), not {', '.join(lacking)}, so that no training "
            f"can go on from it. {ANEW}"
        )
    if other:
        raise ValueError(
            f"{folder} was written by {processes} process(es), but {trainer.args.world_size} are training: "
            f"{', '.join(lacking)} cannot be there. Resume with as many processes as wrote it. {ANEW}"
        )
    raise ValueError(
        f"{folder} lacks {', '.join(lacking)}: without it a part of the training would silently begin anew. Resume "
        f"from another checkpoint. {ANEW}"
    )


def _engine_files(trainer: Trainer, folder: Path) -> list[str]:
    """What transformers, under the engine in use, has written of the optimizer, the schedule and the generators."""
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
    """DeepSpeed's own: a file that names a folder, and there, from ZeRO stage 1 on, each process's optimizer."""
    if not (folder / "latest").is_file():
        return ["latest"]
    tag = (folder / "latest").read_text(encoding="utf-8").strip()
    if not stage:
        return [tag]
    found = sorted((folder / tag).glob(f"*zero_pp_rank_{process}_mp_rank_*_optim_states.pt"))
    return [str(path.relative_to(folder)) for path in found] or [
        f"{tag}/zero_pp_rank_{process}_mp_rank_00_optim_states.pt"
    ]
