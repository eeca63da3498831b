"""Checkpoints that are used only if they are complete, so that a run can be interrupted at any time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from gflowtrl.compat import PREFIX_CHECKPOINT_DIR
from gflowtrl.policy.modules import copy_whole

from .resume import best_so_far, check_resumable, last_checkpoint, remove_checkpoints


if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object  # mixed into trainers at runtime


class _BestSoFar(TrainerCallback):
    """Tells a resumed training where its best checkpoint is; `folder` None: the trainer state is right."""

    folder: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.folder is not None:
            state.best_model_checkpoint = self.folder


class CompleteCheckpointsMixin(TrainerBase):
    """Mixin for any `transformers.Trainer`: the trainer state is written after every process has written all other
    files, and `train(resume_from_checkpoint=True)` uses the newest checkpoint that contains it."""

    _checkpoint_limit: int | None = None  # args.save_total_limit during training

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs: Any):
        """Train. `resume_from_checkpoint` is a folder, or True for the last complete checkpoint in `args.output_dir`.

        A trial of a search for hyperparameters writes its checkpoints to a folder of its own, `run-NUMBER`.

        Raises:
            ValueError: the checkpoint is damaged, or a part of the training state is missing (the message names it).
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True, but {self.args.output_dir} contains no complete checkpoint. "
                    f"Leave it out to start a new training."
                )
        best = _BestSoFar()
        if resume_from_checkpoint:
            check_resumable(self, resume_from_checkpoint, self._extra_state_files(str(resume_from_checkpoint)))
            best.folder = best_so_far(resume_from_checkpoint, self.args.load_best_model_at_end)
        # Old checkpoints are removed by this class: the Trainer would also remove folders of the user.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._checkpoint_limit = limit if limit and limit > 0 else None
        self.add_callback(best)
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, trial=trial, **kwargs)
            if self._checkpoint_limit == 1 and self.state.best_model_checkpoint is not None:
                self._remove_checkpoints(trial, {Path(self.state.best_model_checkpoint)})
            return result
        finally:
            self.remove_callback(best)
            self.args.save_total_limit, self._checkpoint_limit = limit, None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as usual, with the user's `save_total_limit` in `training_args.bin`."""
        current = self.args.save_total_limit
        self.args.save_total_limit = current if self._checkpoint_limit is None else self._checkpoint_limit
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.save_total_limit = current

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        best, newest = self.state.best_model_checkpoint, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        kept = {Path(self._get_output_dir(trial), newest), *([Path(best)] if best else [])}
        self._remove_checkpoints(trial, kept)

    def _remove_checkpoints(self, trial: Any, kept: set[Path]) -> None:
        if self._checkpoint_limit is not None and self.args.should_save:
            remove_checkpoints(self._get_output_dir(trial), self._checkpoint_limit, kept)

    def _extra_state_files(self, checkpoint: str) -> list[str]:
        """Return the names of the files that this trainer adds to the files of transformers in a checkpoint."""
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
        self.accelerator.wait_for_everyone()  # afterwards the main process writes the trainer state


def load_into_shards(model: Any, directory: str | os.PathLike) -> bool:
    """Load a checkpoint's weights into a model that FSDP2 has sharded, in all processes, one tensor at a time.

    accelerate cannot load embeddings that several modules share, wrapped by PEFT or not.

    Returns:
        Whether weights were loaded: False if FSDP2 is not in use, or if the checkpoint contains no full weights
        (`SHARDED_STATE_DICT`).

    Raises:
        ValueError: the checkpoint contains a weight that the model does not have.
    """
    if not isinstance(model, FSDPModule):
        return False
    sharded, adapted = cast(nn.Module, model), isinstance(model, PeftModel)
    state = get_peft_model_state_dict(model) if adapted else sharded.state_dict()  # views of the parameters
    files = sorted(Path(directory).glob("adapter_model*.safetensors" if adapted else "model*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as saved:
            names = list(saved.keys())
            if unknown := [name for name in names if name not in state]:
                raise ValueError(f"{file} contains {unknown[0]!r}, which the model does not have.")
            for name in names:
                copy_whole(saved.get_tensor(name), state[name])
    return bool(files)
