"""Means of a training's metrics between two log lines, over all processes."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .checkpoints import TrainerBase


class RecordingMixin(TrainerBase):
    """Mixin: `record` collects values, and each log line has their means. The time of each part is recorded too."""

    def _start_recording(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._metric_sums: dict[str, list[Tensor | float]] = defaultdict(lambda: [0.0, 0.0])

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of a micro-batch, and record the time of the step and its parts."""
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._seconds["step"] = time.perf_counter() - start
        self.record({f"seconds/{part}": seconds for part, seconds in self._seconds.items()})
        self._seconds.clear()
        return loss

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Context manager: add the host's time in a part of the step to its sum, without nested parts."""
        start, before = time.perf_counter(), sum(self._seconds.values())
        yield
        nested = sum(self._seconds.values()) - before
        self._seconds[part] += time.perf_counter() - start - nested

    def record(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Add values to the running means of the next log line, ignoring NaN. Tensors stay on their device."""
        for name, value in metrics.items():
            value = torch.as_tensor(value, dtype=torch.float32).detach()
            valid = torch.isfinite(value)
            sums = self._metric_sums[name]
            sums[0] = sums[0] + torch.where(valid, value, 0.0)
            sums[1] = sums[1] + valid.float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the given values and the means of the recorded metrics since the last log line, over all processes."""
        sums = self._metric_sums
        if sums and "loss" in logs:
            # A reward may report a metric on one process only, but all processes must reduce the same ones.
            names = sorted(set(gather_object(sorted(sums))))
            table = torch.tensor([[float(x) for x in sums[name]] for name in names], device=self.args.device)
            means = [total / count if count else math.nan for total, count in self._reduce_sum(table).tolist()]
            logs = logs | dict(zip(names, means, strict=True))
            sums.clear()
        super().log(logs, start_time)

    def _reduce_sum(self, tensor: Tensor) -> Tensor:
        total = self.accelerator.reduce(tensor, "sum")
        assert isinstance(total, Tensor)
        return total
