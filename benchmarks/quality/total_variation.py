"""Does each objective reach R / Z? Total variation over all leaves, untrained and trained.

    python benchmarks/quality/total_variation.py --out benchmarks/results/quality/total_variation.json
    python benchmarks/quality/total_variation.py --backbones t5 --leaves 5000 --prompts 8 --hidden_size 128

`GFlowNetTrainer` trains a small Llama or T5 from random weights on a tree of random ids. Every prompt has different
rewards: log R ~ N(c, 2^2), independent for every leaf and prompt, so that nothing can be guessed and everything must
be learned. c increases from -3 to 3 over the prompts, so that a single Z would not fit them. The policy's exact
distribution over all leaves is then compared with R / Z. The seed determines the tree, the rewards and the weights.
"""

from __future__ import annotations

import argparse
import itertools
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
from types import MappingProxyType
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

import gflowtrl
from gflowtrl import GFlowNetConfig, GFlowNetTrainer, ItemCatalog
from gflowtrl.data import PromptEncoder, Step, build_tokenizer
from gflowtrl.metrics import total_variation
from gflowtrl.policy import make_policy
from gflowtrl.rewards import Reward
from gflowtrl.samplers import OnPolicySampler


STD = 2.0

# On-policy draws alone miss leaves that the policy finds improbable; uniform draws rarely hit leaves that matter.
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
    """How an objective is trained. Every step has each prompt once, with K trajectories from `SAMPLERS[sampler]`."""

    steps: int
    sampler: str
    num_generations: int = 64
    learning_rate: float = 3e-3
    flows: str = "learned"


SETTINGS = {
    "trajectory_balance": Setting(1500, "mixture"),
    "vargrad": Setting(1500, "mixture"),
    "contrastive_balance": Setting(1500, "mixture"),
    "detailed_balance": Setting(2500, "mixture"),
    "subtrajectory_balance": Setting(1500, "mixture"),
    "exact_flow": Setting(600, "reward"),
}


class TableReward(Reward):
    """Reward that reads log R from a table `(prompts, items)`. The history of prompt i is item i."""

    def __init__(self, log_rewards: Tensor):
        super().__init__("table")
        self.log_rewards = log_rewards

    def score_items(self, step: Step) -> Tensor:
        return self.log_rewards[[history[0] for history in step.columns["history"]]]


@dataclass(frozen=True)
class Problem:
    """A catalog and the log R `(prompts, leaves)` of some prompts."""

    tokenizer: PreTrainedTokenizerBase
    catalog: ItemCatalog
    reward: TableReward

    @classmethod
    def draw(cls, num_leaves: int, seed: int, num_prompts: int = 3, depth: int = 3) -> Problem:
        """Draw random ids, about 60 % of all possible ones, so that nodes differ in their number of children."""
        generator = torch.Generator().manual_seed(seed)
        codes = round((num_leaves / 0.6) ** (1 / depth) + 0.5)
        numbers = torch.randperm(codes**depth, generator=generator)[:num_leaves].tolist()

        def spell(number: int) -> tuple[str, ...]:
            return tuple(f"<{chr(97 + level)}_{number // codes**level % codes}>" for level in range(depth))

        semantic_ids = {item: spell(number) for item, number in enumerate(numbers)}
        tokenizer = build_tokenizer(semantic_ids)
        catalog = ItemCatalog.from_semantic_ids(semantic_ids, tokenizer)
        means = torch.linspace(-3, 3, num_prompts)[:, None]
        log_rewards = means + STD * torch.randn(num_prompts, num_leaves, generator=generator)
        return cls(tokenizer, catalog, TableReward(log_rewards))

    @property
    def num_prompts(self) -> int:
        return len(self.reward.log_rewards)

    def distance(self, model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
        """Return the total variation of the policy to R / Z and the error of the log Z head, if any: `(prompts,)`."""
        policy = make_policy(model.eval(), self.catalog)
        prompts = PromptEncoder(self.catalog, self.tokenizer)([[i] for i in range(self.num_prompts)])
        log_rewards = self.catalog.fold_items(self.reward.log_rewards.double())  # no two items share a leaf here
        target = log_rewards.softmax(1)
        with torch.no_grad():
            log_z = policy.score(prompts, torch.zeros(self.num_prompts, 1, dtype=torch.long)).log_z
        error = None if log_z is None else (log_z - log_rewards.logsumexp(1)).abs()
        return total_variation(policy.leaf_log_probs(prompts).double().exp(), target), error


def small_llama(tokenizer: PreTrainedTokenizerBase, hidden_size: int = 64) -> LlamaForCausalLM:
    """Return a Llama with two layers; width 64 has about 140,000 parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, initializer_range=0.1, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def small_t5(tokenizer: PreTrainedTokenizerBase, hidden_size: int = 64) -> T5ForConditionalGeneration:
    """Return a T5 with one encoder and two decoder layers, gated as in T5 v1.1; ReLU learns much more slowly."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=hidden_size, d_kv=hidden_size // 4, d_ff=4 * hidden_size, num_layers=1,
        num_decoder_layers=2, num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-silu",
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


BACKBONES = {"llama": small_llama, "t5": small_t5}


def train(
    problem: Problem,
    model: PreTrainedModel,
    objective: str,
    setting: Setting,
    seed: int,
    arguments: Mapping[str, Any] = MappingProxyType({"use_cpu": True}),
) -> None:
    """Train `model` in place. Every step has each prompt once, with a new row id.

    `arguments` are additional fields of the configuration, for device and precision.
    """
    count = problem.num_prompts
    rows = [{"row_id": i, "history": [i % count], "target": 0} for i in range(count * setting.steps)]
    with tempfile.TemporaryDirectory() as scratch:
        args = GFlowNetConfig(
            scratch, loss_type=objective, num_generations=setting.num_generations, reward_transform="exp",
            per_device_train_batch_size=count, train_sampling_strategy="sequential", num_train_epochs=1,
            learning_rate=setting.learning_rate, lr_scheduler_type="cosine", warmup_steps=50, seed=seed,
            save_strategy="no", logging_strategy="no", disable_tqdm=not sys.stderr.isatty(), flows=setting.flows,
            **arguments,
        )  # fmt: skip
        trainer = GFlowNetTrainer(
            model, problem.reward, args, Dataset.from_list(rows), processing_class=problem.tokenizer,
            catalog=problem.catalog, sampler=SAMPLERS[setting.sampler],
        )  # fmt: skip
        trainer.train()


def run(
    objective: str,
    seed: int,
    num_leaves: int = 1000,
    setting: Setting | None = None,
    num_prompts: int = 3,
    backbone: str = "llama",
    hidden_size: int = 64,
) -> dict[str, Any]:
    """Train a policy by one objective; report the smallest untrained and the largest trained distance of a prompt."""
    setting = setting or SETTINGS[objective]
    problem = Problem.draw(num_leaves, seed, num_prompts)
    set_seed(seed)
    model = BACKBONES[backbone](problem.tokenizer, hidden_size)
    untrained, _ = problem.distance(model)
    start = time.process_time()  # CPU time, because other programs prolong wall-clock time
    train(problem, model, objective, setting, seed)
    seconds = time.process_time() - start
    trained, error = problem.distance(model)
    return {
        "objective": objective, "backbone": backbone, **asdict(setting), "seed": seed, "leaves": num_leaves,
        "prompts": num_prompts, "hidden_size": hidden_size, "untrained": untrained.min().item(),
        "trained": trained.max().item(), "log_z_error": None if error is None else error.max().item(),
        "seconds": seconds,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- report
HEADER = "| objective | backbone | sampler | K | steps | seed | untrained | trained | log Z error | seconds |"


def table_line(row: Mapping[str, Any]) -> str:
    error = "" if row["log_z_error"] is None else f"{row['log_z_error']:.3f}"
    known = ", known flows" if row["flows"] == "known" else ""
    return (
        f"| `{row['objective']}`{known} | {row['backbone']} | {row['sampler']} | {row['num_generations']} "
        f"| {row['steps']} | {row['seed']} "
        f"| {row['untrained']:.3f} | {row['trained']:.4f} | {error} | {row['seconds']:.0f} |"
    )


def environment() -> dict[str, Any]:
    """Return the machine and the versions, as far as they affect the figures."""
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
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), help="instead of the objective's default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--backbones", nargs="+", default=["llama"], choices=list(BACKBONES))
    parser.add_argument("--leaves", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--hidden_size", type=int, default=64, help="width of the model")
    parser.add_argument("--steps", type=int, help="instead of the objective's default")
    parser.add_argument("--num_generations", type=int, help="instead of the objective's default")
    parser.add_argument("--learning_rate", type=float, help="instead of the objective's default")
    parser.add_argument("--flows", choices=["learned", "known"], help="instead of the objective's default")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    rows = []
    for backbone, objective in itertools.product(options.backbones, options.objectives):
        given = {name: getattr(options, name) for name in ("steps", "num_generations", "learning_rate", "flows")}
        own = replace(SETTINGS[objective], **{name: value for name, value in given.items() if value is not None})
        for sampler, seed in itertools.product(options.samplers or [own.sampler], options.seeds):
            setting = replace(own, sampler=sampler)
            size = (options.prompts, backbone, options.hidden_size)
            rows.append(run(objective, seed, options.leaves, setting, *size))
            print(table_line(rows[-1]), flush=True)
    print("", HEADER, "|---" * 10 + "|", *map(table_line, rows), sep="\n")
    if options.out is None:
        return
    command = shlex.join(["python", "benchmarks/quality/total_variation.py", *sys.argv[1:]])
    report = {"command": command, "date": date.today().isoformat(), **environment()}
    report |= {"log_reward_std": STD, "runs": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
