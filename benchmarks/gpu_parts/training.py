"""Training steps of `GFlowNetTrainer` with whole and separate rows, and of TRL's `GRPOTrainer` on the same task."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from measuring import llama, random_catalog
from torch import Tensor
from training_step import Bench, reward
from transformers import Trainer

from gflowtrl import ItemCatalog
from gflowtrl.data import Step
from gflowtrl.rewards import Reward

from .settings import Row, Rows, RunSettings
from .throughput import measure


#: Items of the longest prompt (20 in the Office recipe), prompts per step (of whole users), trajectories per prompt.
HISTORY, PROMPTS, TRAJECTORIES = (20, 4), (60, 4), (16, 4)


class ItemReward(Reward):
    """The rewards of `training_step.reward` for all items, which exact flows need."""

    def __init__(self, catalog: ItemCatalog):
        super().__init__("item")
        self.values = torch.tensor(reward([" ".join(tokens) for tokens in catalog.semantic_ids]))

    def score_items(self, step: Step) -> Tensor:
        return self.values.to(step.device).expand(len(step), -1)


def user_rows(catalog: ItemCatalog, count: int, items: int) -> Dataset:
    """Return at least `count` rows: each item of a random user but the first, with the items before it as history."""
    users = -(-count // items)
    drawn = torch.randint(len(catalog), (users, items + 1), generator=torch.Generator().manual_seed(0))
    rows = [
        {"user": user, "history": sequence[:place], "target": sequence[place]}
        for user, sequence in enumerate([[catalog.items[i] for i in row] for row in drawn.tolist()])
        for place in range(1, items + 1)
    ]
    return Dataset.from_list([{"row_id": number, **row} for number, row in enumerate(rows)])


def small_catalog(settings: RunSettings):
    """Return `(catalog, tokenizer)` of random ids of three tokens, all of them a choice, on the device."""
    catalog, tokenizer = settings.pick(
        partial(random_catalog, 5000, codes=32), partial(random_catalog, 150, codes=8)
    )()
    return catalog.to(settings.device), tokenizer


@contextmanager
def trainers(settings: RunSettings, size: str) -> Iterator[tuple[Bench, dict[str, Callable[[], Trainer]]]]:
    """Context manager: the trainers to compare, in bf16 mixed precision on the same prompts and rewards.

    Args:
        settings: device and size.
        size: size of the Llama, one of `measuring.SIZES`.

    Yields:
        The bench, whose `given` has the number of prompts per step and K, and a mapping of names to functions that
        build the trainers, each with a fresh copy of the model.
    """
    catalog, tokenizer = small_catalog(settings)
    model = llama(len(tokenizer), size)
    prompts, count = settings.pick(*PROMPTS), settings.pick(*TRAJECTORIES)
    rows = user_rows(catalog, prompts * 32, settings.pick(*HISTORY))
    given = argparse.Namespace(device=settings.device, prompts=prompts, num_generations=count)
    table = ItemReward(catalog)
    losses: dict[str, dict[str, Any]] = {
        "exact_flow": {"num_generations": count, "sampler": "reward", "reward_funcs": table},
        "vargrad": {"num_generations": count, "sampler": "on_policy", "reward_funcs": table},
        "sft": {"reward_funcs": None},
    }
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(model, tokenizer, catalog, rows, given, scratch)
        bench.common |= {"bf16": True, "dataloader_pin_memory": settings.device.type == "cuda"}

        def ours(loss: str, windows: bool) -> Trainer:
            bench.model = copy.deepcopy(model).to(settings.device)
            trainer = bench.ours(loss_type=loss, **losses[loss])
            trainer.shares_prompts = windows
            return trainer

        def grpo() -> Trainer:
            bench.model = copy.deepcopy(model).to(settings.device)
            return bench.grpo()

        found = {f"{loss}, whole rows": partial(ours, loss, True) for loss in losses}
        found["GRPOTrainer"] = grpo
        yield bench, found | {f"{loss}, separate rows": partial(ours, loss, False) for loss in losses}


def training(settings: RunSettings, size: str) -> Rows:
    """Measure the throughput of each trainer. The arguments are those of `trainers`."""
    with trainers(settings, size) as (bench, sides):

        def step(name: str, build: Callable[[], Trainer]) -> Row:
            trainer, prompts = build(), bench.given.prompts
            return {
                "size": size, "parameters": bench.model.num_parameters(), "side": name, "prompts": prompts,
                "num_generations": trainer.num_generations, **measure(trainer, settings, prompts),
            }  # fmt: skip

        yield from (partial(step, name, build) for name, build in sides.items())
