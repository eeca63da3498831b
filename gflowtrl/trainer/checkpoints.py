"""Checkpoints that count only when all of them is there, so that a run can be killed at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gflowtrl.compat import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME
from gflowtrl.policy.modules import copy_whole


if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object  # mixed into trainers


class CompleteCheckpointsMixin(TrainerBase):
    """For any `transformers.Trainer`: the Trainer's state is written when every process has written all else, and
    `train(resume_from_checkpoint=True)` takes the newest checkpoint that has it."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train; `resume_from_checkpoint` is a folder, or True for the last complete one in `args.output_dir`."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True, but {self.args.output_dir} holds no complete checkpoint. "
                    f"Leave it out to begin anew."
                )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if not load_into_shards(model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not load_into_shards(self.model, str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # after it the first process writes the state


def load_into_shards(model: Any, directory: str | os.PathLike) -> bool:
    """Load a checkpoint's weights into a model that FSDP2 has sharded, in all processes, one tensor after another.

    accelerate's own way stumbles over embeddings that several modules share, wrapped by PEFT or not.

    Returns:
        Whether anything was loaded: not where FSDP2 is not in use, nor where the checkpoint holds no whole weights
        (`SHARDED_STATE_DICT`).

    Raises:
        ValueError: the checkpoint holds a weight that the model has not.
    """
    if not isinstance(model, FSDPModule):
        return False
    sharded, adapted = cast(nn.Module, model), isinstance(model, PeftModel)
    own = get_peft_model_state_dict(model) if adapted else sharded.state_dict()  # views of the parameters
    files = sorted(Path(directory).glob("adapter_model*.safetensors" if adapted else "model*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as saved:
            names = list(saved.keys())
            if strangers := [name for name in names if name not in own]:
                raise ValueError(f"{file} holds {strangers[0]!r}, which the model has not.")
            for name in names:
                copy_whole(saved.get_tensor(name), own[name])
    return bool(files)


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint of a folder that was written to its end (the state comes last), or None."""
    found = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    complete = [path for path in found if _readable(path / TRAINER_STATE_NAME)]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def _readable(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
