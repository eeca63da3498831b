"""A training step: GFlowNetTrainer against TRL's GRPOTrainer on the same task, and against an SFT step.

    python benchmarks/speed/training_step.py --out benchmarks/results/speed/training_step.json
    python benchmarks/speed/training_step.py --data_dir DIR --prompts 64    # on the prompts of the Office recipe

Measures complete steps of `trainer.train()`: generation, reward, forward, backward, optimizer, in fp32 without
gradient checkpointing and with AdamW on all sides. GRPO generates with the catalog's constraint (`generate` is patched
with a vectorized logits processor, because TRL has no option for it), so both sides draw K items per prompt and learn
from them with the same reward. All sides train the same model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from decoding import TreeProcessor
from measuring import arguments, llama, office, peak, random_catalog, report, reset_peak, synchronize
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from gflowtrl import GFlowNetConfig, GFlowNetTrainer, ItemCatalog
from gflowtrl.data import PromptEncoder


STEPS = 4  # per round; the first one is not counted


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Return rewards that are cheap, the same for both libraries, and different between items."""
    return [1.0 + zlib.crc32(text.encode()) % 7 for text in completions]


class StepClock(TrainerCallback):
    """Measures the seconds of every step except the first, and the peak memory of the first."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []
        self.memory: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.before = reset_peak(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        if state.global_step == 1:
            self.memory.append(peak(self.device) - self.before)
        else:
            self.seconds.append(time.perf_counter() - self.start)


class Bench:
    """Builds the trainers of one model on the same prompts and measures them."""

    def __init__(self, model, tokenizer, catalog: ItemCatalog, rows: Dataset, given: argparse.Namespace, scratch: str):
        self.model: PreTrainedModel = model
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.catalog, self.rows, self.given = catalog, rows, given
        self.max_history_items = max(map(len, rows["history"]))
        self.encoder = PromptEncoder(catalog, tokenizer, self.max_history_items)
        self.common = {
            "output_dir": scratch, "max_steps": STEPS, "learning_rate": 1e-4, "use_cpu": given.device.type == "cpu",
            "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no",
            "logging_strategy": "no", "disable_tqdm": True, "optim": "adamw_torch", "dataloader_pin_memory": False,
        }  # fmt: skip

    def ours(self, **how: Any) -> Trainer:
        sampler, rewards = how.pop("sampler", None), how.pop("reward_funcs", reward)
        args = GFlowNetConfig(
            **self.common, **how, per_device_train_batch_size=self.given.prompts,
            max_history_items=self.max_history_items,
        )  # fmt: skip
        return GFlowNetTrainer(
            self.model, rewards, args, self.rows, processing_class=self.tokenizer, catalog=self.catalog,
            sampler=sampler,
        )  # fmt: skip

    def grpo(self) -> Trainer:
        from trl import GRPOConfig, GRPOTrainer  # slow to import

        args = GRPOConfig(
            **self.common, per_device_train_batch_size=self.given.prompts * self.given.num_generations,
            num_generations=self.given.num_generations, max_completion_length=self.catalog.tree.max_depth,
            steps_per_generation=1, num_iterations=1, beta=0.0,
        )  # fmt: skip
        texts = [
            self.tokenizer.decode(self.encoder([history])["input_ids"][0, 1:]) for history in self.rows["history"]
        ]
        trainer = GRPOTrainer(
            self.model, reward, args=args, train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=self.tokenizer,
        )  # fmt: skip
        self._constrain(trainer)
        return trainer

    def _constrain(self, trainer: Trainer) -> None:
        unconstrained = self.model.generate

        def generate(**kwargs: Any):
            processor = TreeProcessor(self.catalog.tree, kwargs["input_ids"].shape[1])
            return unconstrained(**kwargs, logits_processor=LogitsProcessorList([processor]))

        def training_step(*args: Any, **kwargs: Any):
            self.model.generate = generate
            try:
                return own_step(*args, **kwargs)
            finally:
                del self.model.generate

        own_step, trainer.training_step = trainer.training_step, training_step

    def sides(self, with_grpo: bool) -> dict[str, Callable[[], Trainer]]:
        count = self.given.num_generations
        ours = {
            "SFT": lambda: self.ours(loss_type="sft", reward_funcs=None),
            f"vargrad, K {count}, off policy": lambda: self.ours(
                loss_type="vargrad", num_generations=count, sampler="uniform"
            ),
            f"vargrad, K {count}, on policy": lambda: self.ours(
                loss_type="vargrad", num_generations=count, sampler="on_policy"
            ),
        }
        if self.given.compile:
            ours |= {
                f"vargrad, K {count}, {sampler.replace('_', ' ')}, torch.compile": lambda sampler=sampler: self.ours(
                    loss_type="vargrad", num_generations=count, sampler=sampler, torch_compile=True
                )
                for sampler in ("uniform", "on_policy")
            }
        return {"GRPOTrainer": self.grpo, **ours} if with_grpo else ours

    def run(self, with_grpo: bool, title: str) -> dict[str, dict[str, float]]:
        """Train for a few steps with each trainer in turn, for several rounds; return the medians over all steps."""
        trainers, clocks = {}, {}
        for name, build in self.sides(with_grpo).items():
            trainers[name], clocks[name] = build(), StepClock(self.given.device)
            trainers[name].add_callback(clocks[name])
            trainers[name].remove_callback(PrinterCallback)
        for _ in tqdm(range(self.given.rounds), desc=title, disable=not sys.stderr.isatty(), leave=False):
            for trainer in trainers.values():
                trainer.train()
        return {
            name: {"seconds": statistics.median(clock.seconds), "peak_memory": max(clock.memory)}
            for name, clock in clocks.items()
        }


def random_rows(catalog: ItemCatalog, count: int, items: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(catalog), (count, items + 1), generator=generator).tolist()
    return Dataset.from_list(
        [{"row_id": row, "history": items[:-1], "target": items[-1]} for row, items in enumerate(drawn)]
    )


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--sizes", nargs="+", default=["0.2M", "1.2M"], choices=["0.2M", "1.2M", "6.5M"])
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step")
    parser.add_argument("--num_generations", type=int, default=16, help="K, the items that are drawn per prompt")
    parser.add_argument("--items", type=int, default=26, help="items of a history, three tokens each")
    parser.add_argument("--data_dir", help="use prompts and catalog of the Office recipe instead of random ones")
    parser.add_argument("--compile", action="store_true", help="also run GFlowNetTrainer with torch_compile=True")
    parser.add_argument("--no_grpo", action="store_true", help="run GFlowNetTrainer only")
    given = parser.parse_args()
    rows = []
    for size in given.sizes:
        if given.data_dir is None:
            catalog, tokenizer = random_catalog()
            dataset = random_rows(catalog, given.prompts * STEPS * 2, given.items)
        else:
            run_data = office(given.data_dir)
            catalog, tokenizer = run_data.catalog, run_data.tokenizer
            dataset = run_data.splits.train.shuffle(seed=0).select(range(given.prompts * STEPS * 2))
        model = llama(len(tokenizer), size).to(given.device)
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(model, tokenizer, catalog, dataset, given, scratch)
            measured = bench.run(not given.no_grpo, f"{size} parameters")
        reference = measured["SFT"]["seconds"]
        ours = measured[f"vargrad, K {given.num_generations}, on policy"]["seconds"]
        rows += [
            {
                "size": size, "side": name, "sft_steps": entry["seconds"] / reference,
                "on_policy_steps": entry["seconds"] / ours, **entry,
            }
            for name, entry in measured.items()
        ]  # fmt: skip
    columns = {
        "parameters": "{size}", "side": "{side}", "ms per step": "{seconds_ms:.1f}", "in SFT steps": "{sft_steps:.2f}",
        "in our on-policy steps": "{on_policy_steps:.2f}", "peak memory, MB": "{megabytes:.0f}",
    }  # fmt: skip
    shown = [{**row, "seconds_ms": 1e3 * row["seconds"], "megabytes": row["peak_memory"] / 1e6} for row in rows]
    settings = {"prompts": given.prompts, "num_generations": given.num_generations, "steps_a_round": STEPS - 1}
    report(shown, columns, given, **settings, rounds=given.rounds)


if __name__ == "__main__":
    main()
