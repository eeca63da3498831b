"""The prompts of training rows: their contents, which of them are computed together, and their order."""

from __future__ import annotations

import logging
from typing import Any

import torch
from datasets import Dataset, IterableDataset
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
from .row_sources import RowStream


logger = logging.getLogger(__name__)

#: Maximum number of trajectories per trunk. With fewer, a trunk's tokens are computed more often; with more, attention
#: becomes expensive, since its cost grows with the square of the row length.
MAX_TRAJECTORIES_PER_TRUNK = 120


class TrainingRowsMixin(TrainerBase):
    """Mixin that groups the rows of a window, so that a causal model computes their common tokens once.

    The contents of a prompt depend only on the dataset (`RowWindows`). Packing changes the cost, not the result.

    Attributes:
        shares_prompts: False: compute each prompt in a separate row, for comparisons.
    """

    shares_prompts = True
    num_generations: int
    _encoder: PromptEncoder
    _default_collator: GroupCollator
    _checked_rows: Dataset | None
    _row_windows: tuple[Dataset, RowWindows] | None = None

    def _streamed(self, rows: IterableDataset) -> RowStream:
        """Prepare the configuration for streamed rows, and return rows that are checked as they are read."""
        args: Any = self.args
        args.train_sampling_strategy = "random"  # the order is the stream's own
        # Each process reads the stream and takes its part: what is not a tensor cannot be sent.
        args.accelerator_config.dispatch_batches = False
        return RowStream(rows, self._encoder.catalog)

    def get_train_dataloader(self) -> DataLoader:
        rows, collator = self.train_dataset, self.data_collator
        if not isinstance(rows, Dataset) or collator is not self._default_collator:
            return super().get_train_dataloader()
        windows, reason = self._windows_of(rows), self._why_separate()
        if self.is_world_process_zero():
            logger.info(describe_windows(windows, reason))
        if reason is None:
            self.data_collator = GroupCollator(self._encoder, windows, self._shares(windows), self._rows_per_trunk)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator  # rows of other datasets have no windows

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
        """Whether the prompts of training rows come from windows."""
        return isinstance(self.train_dataset, Dataset) and self._why_separate() is None

    @property
    def _rows_per_trunk(self) -> int:
        return MAX_TRAJECTORIES_PER_TRUNK // self.num_generations

    def _shares(self, windows: RowWindows) -> bool:
        possible = self.shares_prompts and self._why_separate() is None and self._rows_per_trunk > 1
        return possible and len(windows.groups) < len(windows.seen)

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
        """Return why no two prompts can be computed together; None if they can."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if model.config.is_encoder_decoder:
            return "an encoder reads its whole prompt at once"
        if getattr(self._encoder, "encode_windows", None) is None:
            return f"{type(self._encoder).__name__} cannot encode windows"
        if self._encoder.tail:
            return "prompts end with text after the history"
        if type(self._encoder).__call__ is not PromptEncoder.__call__:
            return f"{type(self._encoder).__name__} overrides how prompts are made"
        if max_row_length(model) is not None:
            return "the model's attention depends on the columns of a row"
        return None


def describe_windows(windows: RowWindows, why_separate: str | None) -> str:
    """Return the log line about the prompts of a dataset."""
    least, most, count = int(windows.seen.min()), int(windows.seen.max()), len(windows.seen)
    text = (
        f"Prompts contain {least} to {most} items. {windows.cut} of {count} targets ({windows.cut / count:.1%}) see "
        f"only a part of their history"
    )
    if windows.cut:
        text += f", at least {windows.least_of_cut} items"
    if why_separate is None and len(windows.groups) == count:
        why_separate = "no history continues with the target of another row"
    if why_separate is not None:
        return f"{text}. Every prompt is computed separately: {why_separate}."
    return f"{text}. The prompts form {len(windows.groups)} windows, each of which is computed once."
