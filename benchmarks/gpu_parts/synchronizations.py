"""Count where the host waits for the device in a training step, while sampling, and in a beam search."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from measuring import llama
from transformers import Trainer, TrainerCallback

from gflowtrl.data import PromptEncoder
from gflowtrl.policy import StatelessNoise, make_policy

from .settings import Row, Rows, RunSettings
from .training import HISTORY, PROMPTS, small_catalog, trainers, user_rows


MESSAGE = "called a synchronizing CUDA operation"  # torch's warning
COUNTED_STEP = 4  # earlier steps do one-time work


@contextmanager
def synchronizations() -> Iterator[Counter[tuple[str, str]]]:
    """Context manager: count the operations that make the host wait for the device.

    Yields:
        The number of operations for each pair of `module:line`: the innermost line, and the innermost line of
        gflowtrl ("" if no frame is in gflowtrl). Explicit calls of `torch.cuda.synchronize` do not count.
    """
    found: Counter[tuple[str, str]] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning

        def count(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            if MESSAGE in str(message):
                found[_call_site()] += 1
            else:
                shown(message, *args, **kwargs)

        warnings.showwarning = count
        _set_debug_mode("warn")
        try:
            yield found
        finally:
            _set_debug_mode("default")


def _set_debug_mode(mode: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def _call_site() -> tuple[str, str]:
    """Return the lines that a warning comes from. Called from the function that shows warnings."""
    places, frame = [], sys._getframe(2)
    while frame is not None:
        places.append(f"{frame.f_globals.get('__name__')}:{frame.f_lineno}")
        frame = frame.f_back
    warned = next(place for place in places if not place.startswith(("warnings:", "_py_warnings:")))
    return warned, next((place for place in places if place.startswith("gflowtrl.")), "")


class StepSynchronizations(TrainerCallback):
    """Counts the synchronizations of one complete step, from the end of the previous step."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self._counting = ExitStack()

    def close(self) -> None:
        """Stop counting."""
        self._counting.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        if state.global_step == COUNTED_STEP - 1:
            self.found = self._counting.enter_context(synchronizations())


def count_all(settings: RunSettings) -> Rows:
    """Count for 16 samples per prompt, a beam search of width 20, and a training step of each loss with whole rows."""
    size, prompts = settings.pick("1.2M", "0.2M"), settings.pick(*PROMPTS)
    catalog, tokenizer = small_catalog(settings)
    policy = make_policy(llama(len(tokenizer), size).to(settings.device).eval(), catalog)
    histories = user_rows(catalog, prompts, settings.pick(*HISTORY))["history"][:prompts]
    batch = settings.on_device(PromptEncoder(catalog, tokenizer)(histories))
    noise = StatelessNoise(0).at(0, torch.arange(prompts, device=settings.device))
    yield partial(_count_call, "policy.sample, K 16", lambda: policy.sample(batch, 16, noise))
    yield partial(_count_call, "policy.beam_search, width 20", lambda: policy.beam_search(batch, 20))
    with trainers(settings, size) as (bench, sides):
        bench.common["max_steps"] = COUNTED_STEP
        for name, build in sides.items():
            if name.endswith("whole rows"):
                yield partial(_count_step, f"training step, {name}", build)


def _count_call(name: str, work: Callable[[], Any]) -> Row:
    work()  # one-time work is not counted
    with synchronizations() as found:
        work()
    return _row(name, found)


def _count_step(name: str, build: Callable[[], Trainer]) -> Row:
    trainer, counted = build(), StepSynchronizations()
    trainer.add_callback(counted)
    try:
        trainer.train()
    finally:
        counted.close()
    return _row(name, counted.found)


def _row(work: str, found: Counter[tuple[str, str]]) -> Row:
    """Return a row of the results, sorted by count."""
    sites = [{"line": line, "gflowtrl": ours, "count": count} for (line, ours), count in found.most_common()]
    return {"work": work, "synchronizations": found.total(), "sites": sites}
