"""Does each objective reach R / Z? Total variation over all leaves, untrained and trained.

    python benchmarks/quality/total_variation.py --out benchmarks/results/quality/total_variation.json

`GFlowNetTrainer` trains a small Llama from random weights on a tree of random ids. Three prompts have rewards of their
own: log R ~ N(c, 2^2), independent for every leaf and prompt, so that nothing can be guessed and all must be learned;
c = -3, 0 and 3, so that one Z for all prompts would not do. The policy's exact distribution over all leaves is then
compared with R / Z. A seed draws tree, rewards and weights.
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
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import gflowtrl
from gflowtrl import CausalTreePolicy, GFlowNetConfig, GFlowNetTrainer, ItemCatalog
from gflowtrl.data import PromptEncoder, build_tokenizer
from gflowtrl.metrics import total_variation
from gflowtrl.rewards import Reward
from gflowtrl.samplers import OnPolicySampler


NUM_PROMPTS, STD = 3, 2.0
MEANS = torch.tensor([[-3.0], [0.0], [3.0]])

# A policy that only hears of what it draws itself overlooks leaves, and uniform draws rarely meet those that matter.
MIXTURE = {"on_policy": 2, "flattened": (OnPolicySampler(temperature=2.0), 1), "uniform": 1}
SAMPLERS = {
    "mixture": MIXTURE,
    "on_policy": "on_policy",
    "epsilon": OnPolicySampler(epsilon=0.2),
    "uniform": "uniform",
    "reward": "reward",
}


@dataclass(frozen=True)
class Setting:
    """How an objective is trained; every step has three prompts with K trajectories from `SAMPLERS[sampler]`."""

    steps: int
    sampler: str
    num_generations: int = 64
    learning_rate: float = 3e-3


SETTINGS = {
    "trajectory_balance": Setting(1500, "mixture"),
    "vargrad": Setting(1500, "mixture"),
    "exact_flow": Setting(600, "reward"),
}


class TableReward(Reward):
    """log R from a table `(prompts, items)`; the history of prompt i is item i."""

    def __init__(self, log_rewards: Tensor):
        super().__init__("table")
        self.log_rewards = log_rewards

    def score_items(self, batch: Mapping[str, Any]) -> Tensor:
        return self.log_rewards[[history[0] for history in batch["history"]]]


@dataclass(frozen=True)
class Problem:
    """A catalogue, and log R `(prompts, leaves)` of three prompts on it."""

    tokenizer: PreTrainedTokenizerBase
    catalog: ItemCatalog
    reward: TableReward

    @classmethod
    def draw(cls, num_leaves: int, seed: int, depth: int = 3) -> Problem:
        """Random ids, about 60 % of those that their codes could spell: nodes differ in their number of children."""
        generator = torch.Generator().manual_seed(seed)
        codes = round((num_leaves / 0.6) ** (1 / depth) + 0.5)
        numbers = torch.randperm(codes**depth, generator=generator)[:num_leaves].tolist()

        def spell(number: int) -> tuple[str, ...]:
            return tuple(f"<{chr(97 + level)}_{number // codes**level % codes}>" for level in range(depth))

        semantic_ids = {item: spell(number) for item, number in enumerate(numbers)}
        tokenizer = build_tokenizer(semantic_ids)
        catalog = ItemCatalog.from_semantic_ids(semantic_ids, tokenizer)
        log_rewards = MEANS + STD * torch.randn(NUM_PROMPTS, num_leaves, generator=generator)
        return cls(tokenizer, catalog, TableReward(log_rewards))

    def distance(self, model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
        """Total variation of the policy to R / Z, and the error of log Z where the model has a head: `(prompts,)`."""
        policy = CausalTreePolicy(model.eval(), self.catalog)
        prompts = PromptEncoder(self.catalog, self.tokenizer)([[i] for i in range(NUM_PROMPTS)])
        log_rewards = self.catalog.fold_items(self.reward.log_rewards.double())  # no two items share a leaf here
        target = log_rewards.softmax(1)
        with torch.no_grad():
            log_z = policy.score(prompts, torch.zeros(NUM_PROMPTS, 1, dtype=torch.long)).log_z
        error = None if log_z is None else (log_z - log_rewards.logsumexp(1)).abs()
        return total_variation(policy.leaf_log_probs(prompts).double().exp(), target), error


def small_llama(tokenizer: PreTrainedTokenizerBase, hidden_size: int = 64) -> LlamaForCausalLM:
    """Two layers, some 140,000 parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, initializer_range=0.1, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(problem: Problem, model: PreTrainedModel, objective: str, setting: Setting, seed: int) -> None:
    """Train `model` in place; every step has each of the three prompts once, under a row id of its own."""
    rows = [{"row_id": i, "history": [i % NUM_PROMPTS], "target": 0} for i in range(NUM_PROMPTS * setting.steps)]
    with tempfile.TemporaryDirectory() as scratch:
        args = GFlowNetConfig(
            scratch, loss_type=objective, num_generations=setting.num_generations, reward_transform="exp",
            per_device_train_batch_size=NUM_PROMPTS, train_sampling_strategy="sequential", num_train_epochs=1,
            learning_rate=setting.learning_rate, lr_scheduler_type="cosine", warmup_steps=50, seed=seed, use_cpu=True,
            save_strategy="no", logging_strategy="no", disable_tqdm=not sys.stderr.isatty(),
        )  # fmt: skip
        trainer = GFlowNetTrainer(
            model, problem.reward, args, Dataset.from_list(rows), processing_class=problem.tokenizer,
            catalog=problem.catalog, sampler=SAMPLERS[setting.sampler],
        )  # fmt: skip
        trainer.train()


def run(objective: str, seed: int, num_leaves: int = 1000, setting: Setting | None = None) -> dict[str, Any]:
    """Train one policy by one objective. Over the prompts, the smallest distance untrained and the largest trained."""
    setting = setting or SETTINGS[objective]
    problem = Problem.draw(num_leaves, seed)
    set_seed(seed)
    model = small_llama(problem.tokenizer)
    untrained, _ = problem.distance(model)
    start = time.process_time()  # of the processor, because other programs prolong those of the clock
    train(problem, model, objective, setting, seed)
    seconds = time.process_time() - start
    trained, error = problem.distance(model)
    return {
        "objective": objective, **asdict(setting), "seed": seed, "leaves": num_leaves,
        "untrained": untrained.min().item(), "trained": trained.max().item(),
        "log_z_error": None if error is None else error.max().item(), "seconds": seconds,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- report
HEADER = "| objective | sampler | steps | seed | untrained | trained | log Z error | seconds |"


def table_line(row: Mapping[str, Any]) -> str:
    error = "" if row["log_z_error"] is None else f"{row['log_z_error']:.3f}"
    return (
        f"| `{row['objective']}` | {row['sampler']} | {row['steps']} | {row['seed']} | {row['untrained']:.3f} "
        f"| {row['trained']:.4f} | {error} | {row['seconds']:.0f} |"
    )


def environment() -> dict[str, Any]:
    """Machine and versions, as far as they matter for a figure."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {module.__name__: module.__version__ for module in (gflowtrl, torch, transformers, trl)}
    return {
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **versions},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), help="instead of each objective's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--leaves", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    rows = []
    for objective in options.objectives:
        own = SETTINGS[objective]
        for sampler in options.samplers or [own.sampler]:
            for seed in options.seeds:
                rows.append(run(objective, seed, options.leaves, replace(own, sampler=sampler)))
                print(table_line(rows[-1]), flush=True)
    print("", HEADER, "|---" * 8 + "|", *map(table_line, rows), sep="\n")
    if options.out is None:
        return
    command = shlex.join(["python", "benchmarks/quality/total_variation.py", *sys.argv[1:]])
    report = {"command": command, "date": date.today().isoformat(), **environment()}
    report |= {"log_reward_means": MEANS.flatten().tolist(), "log_reward_std": STD, "runs": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
