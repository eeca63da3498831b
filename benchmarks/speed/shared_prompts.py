"""Seconds per epoch of GFlowNet training with and without prompts that a user's rows share.

    OMP_NUM_THREADS=1 python benchmarks/speed/shared_prompts.py --data_dir DIR --out FILE.json

The recipe's Llama, untrained; whole steps of the trainer (forward, backward, optimizer) on the rows of every
n-th user, and an epoch is n times that. The time is that of the processor, so that other programs do not count.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from datasets import Dataset
from measuring import environment, office
from transformers import TrainerCallback, set_seed

from gflowtrl import GFlowNetConfig, GFlowNetTrainer
from gflowtrl.pipeline.materials import Materials
from gflowtrl.pipeline.models import build_model
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from gflowtrl.teachers import EASE


BATCH = 64
LOSSES = {"sft": 1, "exact_flow": 4, "vargrad": 8}  # and trajectories a prompt


class StepClock(TrainerCallback):
    """Processor seconds and tokens of every step."""

    def __init__(self, model: torch.nn.Module):
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.tokens[-1] += kwargs["input_ids"].numel()

    def on_step_begin(self, args, state, control, **kwargs):
        self.tokens.append(0)
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.start)


def epoch(materials: Materials, teacher: EASE, rows: Dataset, loss: str, shared: int) -> tuple[float, float]:
    """Mean processor seconds and tokens of a step, the first steps left out."""
    set_seed(0)
    model = build_model(materials)
    clock = StepClock(model)
    with tempfile.TemporaryDirectory() as scratch:
        args = GFlowNetConfig(
            scratch, loss_type=loss, num_generations=LOSSES[loss], per_device_train_batch_size=BATCH, use_cpu=True,
            max_shared_prompts=shared, num_train_epochs=1, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=not sys.stderr.isatty(), reward_weights=[0.3, 0.7],
        )  # fmt: skip
        trainer = GFlowNetTrainer(
            model, [GroundTruthReward(), CollaborativeReward(teacher)], args, rows, callbacks=[clock],
            processing_class=materials.tokenizer, catalog=materials.catalog,
            sampler="ground_truth" if loss == "sft" else "reward",
        )  # fmt: skip
        trainer.train()
    return tuple(
        float(torch.tensor(values[2:], dtype=torch.double).mean()) for values in (clock.seconds, clock.tokens)
    )


def compare(materials: Materials, teacher: EASE, rows: Dataset, loss: str, shared: int) -> dict:
    """One loss with and without shared prompts; seconds and tokens of an epoch over all rows."""
    steps = math.ceil(len(materials.splits.train) / BATCH)
    (alone, tokens_alone), (together, tokens_shared) = (
        epoch(materials, teacher, rows, loss, number) for number in (1, shared)
    )
    return {
        "loss": loss, "num_generations": LOSSES[loss], "max_shared_prompts": shared, "steps_an_epoch": steps,
        "seconds_alone": steps * alone, "seconds_shared": steps * together, "ratio": alone / together,
        "tokens_alone": round(steps * tokens_alone), "tokens_shared": round(steps * tokens_shared),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the folder of the data")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--max_shared_prompts", nargs="+", type=int, default=[6])
    parser.add_argument("--every", type=int, default=12, help="take every n-th user")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    materials = office(given.data_dir)
    teacher = EASE.fit(materials.splits.train_sequences, materials.data.items, regularization=100.0)
    users = set(materials.data.users[:: given.every])
    sample = materials.splits.train.filter(lambda row: row["user"] in users)
    rows = [
        compare(materials, teacher, sample, loss, shared)
        for loss, shared in itertools.product(given.losses, given.max_shared_prompts)
    ]
    print("\n| loss | K | rows a prompt | s / epoch alone | shared | ratio | tokens alone | shared |")
    print("|---" + "|---:" * 7 + "|")
    for row in rows:
        print(
            f"| `{row['loss']}` | {row['num_generations']} | {row['max_shared_prompts']} | {row['seconds_alone']:.0f} "
            f"| {row['seconds_shared']:.0f} | {row['ratio']:.2f} | {row['tokens_alone']:,} "
            f"| {row['tokens_shared']:,} |"
        )
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"date": date.today().isoformat(), "data": materials.data.name, **environment(), "rows": rows}
        given.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
