"""Checkpoints that count only when all of them is there, so that a run can be killed at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class CompleteCheckpointsMixin:
    """For any `transformers.Trainer`: the Trainer's state is written when every process has written all else, and
    `train(resume_from_checkpoint=True)` takes the newest checkpoint that has it."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train; `resume_from_checkpoint` is a folder, or True for the last complete one in `args.output_dir`."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True, but {self.args.output_dir} holds no complete checkpoint. "
                    f"Leave it out to begin anew."
                )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # after it the first process writes the state


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
