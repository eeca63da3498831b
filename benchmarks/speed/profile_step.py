"""Profile of a training step and of a beam search, by torch.profiler.

    python benchmarks/speed/profile_step.py --text benchmarks/results/speed/profile.txt

Profiles complete steps of `GFlowNetTrainer` (VarGrad, K on-policy trajectories for each of 8 prompts of 79 tokens)
after a warm-up, and one beam search of 128 prompts. Operators are sorted by their self time.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from measuring import arguments, llama, random_catalog, random_prompts
from torch.profiler import ProfilerActivity, profile
from training_step import STEPS, Bench, random_rows

from gflowtrl.policy import make_policy


def table(title: str, work: Callable[[], None], device: torch.device, rows: int) -> str:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, profile_memory=True) as recorded:
        work()
    order = f"self_{device.type}_time_total"
    return f"{title}\n{recorded.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=50)}"


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("--size", default="1.2M")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--num_generations", type=int, default=16)
    parser.add_argument("--operators", type=int, default=25, help="number of operators to list")
    parser.add_argument("--text", type=Path, help="file for the tables")
    given = parser.parse_args()
    catalog, tokenizer = random_catalog()
    model = llama(len(tokenizer), given.size).to(given.device)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            model, tokenizer, catalog, random_rows(catalog, given.prompts * STEPS, 26), given, scratch
        )  # fmt: skip
        trainer = bench.ours(loss_type="vargrad", num_generations=given.num_generations, sampler="on_policy")
        trainer.train()
        step = table(f"{STEPS} training steps", trainer.train, given.device, given.operators)
    policy = make_policy(model.eval(), catalog)
    prompts = random_prompts(128, 80, len(tokenizer), given.device, ragged=True)
    policy.beam_search(prompts, 20)
    search = table("beam search", lambda: policy.beam_search(prompts, 20), given.device, given.operators)
    machine = f"{date.today()}, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    text = f"{machine}\n\n{step}\n\n{search}\n"
    print(text)
    if given.text is not None:
        given.text.parent.mkdir(parents=True, exist_ok=True)
        given.text.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
