"""Checkpoints that count only when they are complete, so that a run can be killed at any moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gflowtrl.compat import PREFIX_CHECKPOINT_DIR
from gflowtrl.policy.modules import copy_whole

from .resume import check_resumable, last_checkpoint, remove_checkpoints


if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object  # mixed into trainers


class CompleteCheckpointsMixin(TrainerBase):
    """For any `transformers.Trainer`: the Trainer's state is written when every process has written all else, and
    `train(resume_from_checkpoint=True)` takes the newest checkpoint that has it."""

    _checkpoint_limit: int | None = None  # args.save_total_limit, while a training runs

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train; `resume_from_checkpoint` is a folder, or True for the last complete one in `args.output_dir`.

        Raises:
            ValueError: the checkpoint is damaged, or lacks a part of the training's state (the message names it).
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True, but {self.args.output_dir} holds no complete checkpoint. "
                    f"Leave it out to begin anew."
                )
        if resume_from_checkpoint:
            check_resumable(self, resume_from_checkpoint, self._own_state_files(str(resume_from_checkpoint)))
        # Which checkpoints are given up is decided here: the Trainer would take folders of the user's.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._checkpoint_limit = limit if limit and limit > 0 else None
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            if self._checkpoint_limit == 1 and self.state.best_model_checkpoint is not None:
                self._remove_checkpoints({Path(self.state.best_model_checkpoint)})
            return result
        finally:
            self.args.save_total_limit, self._checkpoint_limit = limit, None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As ever; `training_args.bin` has the user's `save_total_limit`."""
        hidden = self.args.save_total_limit
        self.args.save_total_limit = hidden if self._checkpoint_limit is None else self._checkpoint_limit
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.save_total_limit = hidden

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        best, newest = self.state.best_model_checkpoint, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._remove_checkpoints({Path(str(self.args.output_dir), newest), *([Path(best)] if best else [])})

    def _remove_checkpoints(self, kept: set[Path]) -> None:
        if self._checkpoint_limit is not None and self.args.should_save:
            remove_checkpoints(str(self.args.output_dir), self._checkpoint_limit, kept)

    def _own_state_files(self, checkpoint: str) -> list[str]:
        """Names of what this trainer has written into a checkpoint beside transformers' files."""
        return []

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
