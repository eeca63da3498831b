"""Does each objective reach R / Z? Total variation over all leaves, before and after training.

    python benchmarks/quality/total_variation.py --out benchmarks/results/quality/total_variation.json

A small Llama with random weights is trained by `GFlowNetTrainer` on a tree of random ids. Three prompts have rewards of
their own, log R ~ N(0, 2^2), independent for every leaf and prompt: nothing can be guessed, all must be learned. The
policy's exact distribution over all leaves is then compared with R / Z, the worst of the three prompts counting.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from transformers.utils import logging

from gflowtrl import GFlowNetConfig, GFlowNetTrainer, ItemCatalog
from gflowtrl.data import PromptEncoder, build_tokenizer
from gflowtrl.metrics import total_variation
from gflowtrl.policy import CausalTreePolicy
from gflowtrl.rewards import Reward
from gflowtrl.samplers import MixtureSampler, OnPolicySampler, UniformSampler


NUM_PROMPTS, STD = 3, 2.0


@dataclass(frozen=True)
class Setting:
    """How an objective is trained. `num_generations` is K, trajectories a prompt and step."""

    steps: int
    num_generations: int
    learning_rate: float
    hidden_size: int = 64


SETTINGS = {
    "trajectory_balance": Setting(1500, 64, 3e-3),
    "vargrad": Setting(1500, 64, 3e-3),
    "exact_flow": Setting(1000, 64, 3e-3),
}


class TableReward(Reward):
    """log R from a table `(prompts, items)`; a prompt's history is the one item of the prompt's number."""

    def __init__(self, log_rewards: Tensor):
        super().__init__("table")
        self.log_rewards = log_rewards

    def score_items(self, batch: Mapping[str, Any]) -> Tensor:
        return self.log_rewards[[history[0] for history in batch["history"]]]


def random_semantic_ids(num_leaves: int, seed: int, depth: int = 3) -> dict[int, tuple[str, ...]]:
    """Distinct random ids, some 60 % of all that their codes could spell: nodes differ in their number of children."""
    codes = round((num_leaves / 0.6) ** (1 / depth) + 0.5)
    chosen = torch.randperm(codes**depth, generator=torch.Generator().manual_seed(seed))[:num_leaves]
    digits = torch.stack([chosen // codes**level % codes for level in range(depth)], 1)
    return {i: tuple(f"<{'abcdefgh'[lv]}_{code}>" for lv, code in enumerate(row)) for i, row in enumerate(digits.tolist())}


def behaviour(objective: str) -> MixtureSampler | None:
    """Half on policy, a quarter of it flattened, a quarter uniform; `exact_flow` keeps its default, R / Z itself."""
    if objective == "exact_flow":
        return None
    return MixtureSampler(
        {"on_policy": 2, "flattened": (OnPolicySampler(temperature=2.0), 1), "uniform": (UniformSampler(), 1)}
    )


def run(objective: str, seed: int, num_leaves: int, setting: Setting) -> dict[str, Any]:
    """Train one policy by one objective; returns the row of the table."""
    set_seed(seed)
    semantic_ids = random_semantic_ids(num_leaves, seed)
    tokenizer = build_tokenizer(semantic_ids)
    catalog = ItemCatalog.from_semantic_ids(semantic_ids, tokenizer)
    log_rewards = STD * torch.randn(NUM_PROMPTS, num_leaves)
    hidden = setting.hidden_size
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32, initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    policy = CausalTreePolicy(model, catalog)
    prompts = PromptEncoder(catalog, tokenizer)([[i] for i in range(NUM_PROMPTS)])
    target = catalog.fold_items(log_rewards.double().exp())
    log_z = target.sum(1).log()

    def distance() -> float:
        model.eval()
        return total_variation(policy.leaf_log_probs(prompts).exp().double(), target / target.sum(1, keepdim=True)).max().item()

    untrained = distance()
    rows = [{"row_id": i, "history": [i % NUM_PROMPTS], "target": 0} for i in range(NUM_PROMPTS * setting.steps)]
    with tempfile.TemporaryDirectory() as scratch:
        args = GFlowNetConfig(
            scratch, loss_type=objective, num_generations=setting.num_generations, reward_transform="exp",
            per_device_train_batch_size=NUM_PROMPTS, train_sampling_strategy="sequential", num_train_epochs=1,
            learning_rate=setting.learning_rate, lr_scheduler_type="cosine", warmup_steps=50,
            seed=seed, use_cpu=True, save_strategy="no", logging_steps=200, disable_tqdm=True,
        )  # fmt: skip
        trainer = GFlowNetTrainer(
            model, TableReward(log_rewards), args, Dataset.from_list(rows), processing_class=tokenizer,
            catalog=catalog, sampler=behaviour(objective),
        )  # fmt: skip
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    row = {"objective": objective, "seed": seed, "leaves": num_leaves, "untrained": untrained, "trained": distance()}
    estimate = policy.score(prompts, torch.zeros(NUM_PROMPTS, 1, dtype=torch.long)).log_z
    row["log_z_error"] = None if estimate is None else (estimate - log_z).abs().max().item()
    return row | asdict(setting) | {"seconds": seconds}


if __name__ == "__main__":
    import ast
    objective, seed = sys.argv[1], int(sys.argv[2])
    setting = Setting(**{k: ast.literal_eval(v) for k, v in (a.split("=") for a in sys.argv[4:])})
    print(run(objective, seed, int(sys.argv[3]), setting))
