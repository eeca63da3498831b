"""What the prompts of training rows hold, which of them are computed together, and in which order they come."""

from __future__ import annotations

import logging
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from gflowtrl.data import (
    GroupCollator,
    GroupedEpochSampler,
    LengthGroupedEpochSampler,
    PromptEncoder,
    RowWindows,
)
from gflowtrl.policy.support import max_row_length

from .checkpoints import TrainerBase
from .evaluation import rows_per_step
from .input_checks import check_rows


logger = logging.getLogger(__name__)

#: Trajectories that hang on one trunk at most. Fewer read the trunk's tokens more often; more pay for attention, which
#: grows with the square of a row.
TRAJECTORIES_OF_A_ROW = 120


class TrainingRowsMixin(TrainerBase):
    """Rows of one window come together, and a causal model computes what they share once.

    What a prompt holds follows from the data set alone (`RowWindows`); packing changes the cost, not the result.

    Attributes:
        shares_prompts: False to compute the same prompts in rows of their own, for comparisons.
    """

    shares_prompts = True
    num_generations: int
    _encoder: PromptEncoder
    _own_collator: GroupCollator
    _checked_rows: Dataset | None
    _row_windows: tuple[Dataset, RowWindows] | None = None

    def get_train_dataloader(self) -> DataLoader:
        rows, own = self.train_dataset, self.data_collator
        if not isinstance(rows, Dataset) or own is not self._own_collator:
            return super().get_train_dataloader()
        windows, why = self._windows_of(rows), self._why_separate()
        if self.is_world_process_zero():
            logger.info(describe_windows(windows, why))
        if why is None:
            self.data_collator = GroupCollator(self._encoder, windows, self._shares(windows), self._rows_of_a_trunk)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = own  # rows of other data sets have no windows

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(rows, Dataset) or self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        windows = self._windows_of(rows)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if not self._shares(windows):
            lengths = torch.tensor(windows.seen_by(rows["row_id"][:]))
            return LengthGroupedEpochSampler(lengths, rows_per_step(self.args), seed)
        return GroupedEpochSampler(windows.groups, windows.lengths, rows_per_step(self.args), seed)

    @property
    def uses_windows(self) -> bool:
        """Whether the prompts of training rows are those of windows."""
        return isinstance(self.train_dataset, Dataset) and self._why_separate() is None

    @property
    def _rows_of_a_trunk(self) -> int:
        return TRAJECTORIES_OF_A_ROW // self.num_generations

    def _shares(self, windows: RowWindows) -> bool:
        may = self.shares_prompts and self._why_separate() is None and self._rows_of_a_trunk > 1
        return may and len(windows.groups) < len(windows.seen)

    def _windows_of(self, rows: Dataset) -> RowWindows:
        if self._row_windows is None or self._row_windows[0] is not rows:
            if rows is not self._checked_rows:
                check_rows(rows, self._encoder.catalog)
            longest = self._encoder.max_history_items
            if self._why_separate() is None:
                windows = RowWindows.of(rows, self._encoder.catalog.items, longest)
            else:
                windows = RowWindows.separate(rows, longest)
            self._row_windows = rows, windows
        return self._row_windows[1]

    def _why_separate(self) -> str | None:
        """Why no two prompts can share what is computed; None where they can."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if model.config.is_encoder_decoder:
            return "an encoder sees its whole prompt at once"
        if getattr(self._encoder, "encode_windows", None) is None:
            return f"{type(self._encoder).__name__} cannot encode windows"
        if self._encoder.tail:
            return "prompts end with text behind the history"
        if type(self._encoder).__call__ is not PromptEncoder.__call__:
            return f"{type(self._encoder).__name__} makes prompts in its own way"
        if max_row_length(model) is not None:
            return "the model counts the columns of a row"
        return None


def describe_windows(windows: RowWindows, why_separate: str | None) -> str:
    """What the log says about the prompts of a data set."""
    least, most, count = int(windows.seen.min()), int(windows.seen.max()), len(windows.seen)
    text = (
        f"Prompts hold {least} to {most} items. {windows.cut} of {count} targets ({windows.cut / count:.1%}) see a "
        f"part of their history only"
    )
    if windows.cut:
        text += f", {windows.least_of_cut} items or more"
    if why_separate is not None:
        return f"{text}. Every prompt is computed by itself: {why_separate}."
    if len(windows.groups) == count:
        return f"{text}. Every prompt is computed by itself: no history goes on with another's target."
    return f"{text}. They begin {len(windows.groups)} windows, which are computed once."
