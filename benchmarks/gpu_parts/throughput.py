"""Steps, prompts and tokens per second of a trainer, and the minimum time that its FLOPs need."""

from __future__ import annotations

import statistics
import time
from typing import Any

from measuring import peak, reset_peak, synchronize
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from gflowtrl.policy.modules import innermost

from .flops import Work
from .settings import RunSettings


class BlockClock(TrainerCallback):
    """Measures seconds per step in blocks of steps after a warm-up.

    The device is synchronized between blocks only, so that the host can run ahead as in normal training.
    """

    def __init__(self, work: Work, settings: RunSettings):
        self.work, self.device = work, settings.device
        self.warmup, self.blocks, self.size = settings.pick((4, 3, 5), (1, 1, 2))
        self.seconds: list[float] = []

    @property
    def steps(self) -> int:
        """Number of training steps: all blocks and the warm-up."""
        return self.warmup + self.blocks * self.size

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self.warmup
        if done < 0 or done % self.size:
            return
        synchronize(self.device)
        now = time.perf_counter()
        if done == 0:
            reset_peak(self.device)
            self.work.reset()
        else:
            self.seconds.append((now - self.start) / self.size)
        self.start = time.perf_counter()


def measure(trainer: Trainer, settings: RunSettings, prompts: int) -> dict[str, float]:
    """Train for some steps and measure them.

    Args:
        trainer: a trainer that has not trained yet.
        settings: device and size.
        prompts: number of prompts per step.

    Returns:
        Figures per step and per second. `floor_seconds` is the time of a step at the device's measured peak, and
        `model_flops_utilization` its share of the actual time. `peak_memory` is in bytes and includes the model (on a
        CPU: the whole process).
    """
    clock = BlockClock(Work(innermost(trainer.model)), settings)
    trainer.args.max_steps = clock.steps
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds, steps, work = statistics.median(clock.seconds), clock.size * clock.blocks, clock.work
    read = work.tokens + work.tokens_without_gradient
    floor = work.flops / steps / settings.peak_flops
    return {
        "seconds_per_step": seconds, "slowest_block": max(clock.seconds), "steps_per_second": 1 / seconds,
        "prompts_per_second": prompts / seconds, "tokens_per_step": work.tokens / steps,
        "tokens_read_per_step": read / steps, "tokens_per_second": read / steps / seconds,
        "flops_per_step": work.flops / steps, "floor_seconds": floor, "model_flops_utilization": floor / seconds,
        "peak_memory": peak(settings.device),
    }  # fmt: skip
