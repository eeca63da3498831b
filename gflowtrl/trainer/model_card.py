"""The README.md of a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .base import BaseTrainer

_TEMPLATE = """---
library_name: gflowtrl
tags:
- recommendation
- generative-recommendation
- gflownet
- trl
---

# A generative recommender

A {architecture} that recommends one of {items:,} items by writing its semantic id ({depth} tokens at most),
trained with gflowtrl's `{trainer}`.

```python
from gflowtrl import Recommender

recommender = Recommender.from_pretrained("path/to/this/folder")
recommender.recommend([[{example}]], k=10)
```

## Training

| | |
|---|---|
{settings}

## Evaluation

{metrics}

Constrained beam search of width {beams}, every item a candidate, items already seen not removed.
"""


def write_model_card(trainer: BaseTrainer, directory: str | os.PathLike) -> None:
    """Write what this model is, how it was trained and its last evaluation into `directory/README.md`."""
    args, state = trainer.args, trainer.state
    step = state.global_step
    if args.load_best_model_at_end and state.best_global_step and not trainer.is_in_train:
        step = state.best_global_step  # training has ended, and these are the weights that were loaded back
    settings = {"step": step, "learning rate": args.learning_rate}
    settings |= {"prompts per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size}
    settings |= trainer.card_settings()
    evaluations = [log for log in state.log_history if log["step"] <= step and "eval_runtime" in log]
    last = evaluations[-1] if evaluations else None
    metrics = "Not evaluated yet."
    if last is not None:
        shown = [n for n in last if n.startswith(("eval_recall", "eval_ndcg", "eval_coverage"))]
        metrics = f"Validation at step {last['step']}: " + ", ".join(f"{n[5:]} {last[n]:.4f}" for n in shown) + "."
    text = _TEMPLATE.format(
        architecture=type(trainer.accelerator.unwrap_model(trainer.model)).__name__,
        items=len(trainer._catalog),
        depth=trainer._catalog.tree.max_depth,
        trainer=type(trainer).__name__,
        example=repr(trainer._catalog.items[0]),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        metrics=metrics,
        beams=trainer._num_beams,
    )
    Path(directory, "README.md").write_text(text, encoding="utf-8")
