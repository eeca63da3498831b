"""Training on catalogs of 10,000 and 1,000,000 items: seconds per step and memory of the process.

    OMP_NUM_THREADS=1 python benchmarks/speed/large_catalog.py --out benchmarks/results/speed/large_catalog.json

Random distinct ids of four tokens with 256 codes, the 1.2 M Llama, and rewards of the target and of a SASRec with
random weights (64 wide), which scores all items. Exact flows keep the rewards of the 1,000 best leaves of each prompt
where the table of all leaves is too large (`max_exact_elements`). Half of the trajectories of VarGrad are on policy,
the others off policy. Each row is measured in a process of its own; the first ten steps do not count.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings

import numpy as np
import torch
from datasets import Dataset
from measuring import arguments, in_own_process, llama, peak, random_catalog, report
from transformers import TrainerCallback

from gflowtrl import GFlowNetConfig, GFlowNetTrainer
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from gflowtrl.samplers import build_sampler
from gflowtrl.teachers import SASRec


METHODS = {"exact_flow": None, "vargrad": {"ground_truth": 1, "collaborative": 3, "on_policy": 4}}
WARM_UP = 10


class Clock(TrainerCallback):
    """Collects the seconds of all steps."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def measure(method: str, items: int, steps: int, batch: int) -> dict:
    """Train for some steps and return the median of their seconds and the peak memory of the process."""
    start = time.perf_counter()
    catalog, tokenizer = random_catalog(items, depth=4)
    built = time.perf_counter() - start
    random = np.random.default_rng(0)
    drawn = random.integers(0, items, (steps * batch, 11))
    rows = {"row_id": range(len(drawn)), "history": drawn[:, :-1].tolist(), "target": drawn[:, -1].tolist()}
    torch.manual_seed(0)
    teacher, clock = SASRec(catalog.items), Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = GFlowNetConfig(
            folder, loss_type=method, max_steps=steps, per_device_train_batch_size=batch, num_generations=8,
            use_cpu=True, report_to="none", save_strategy="no", logging_steps=steps, disable_tqdm=True,
            reward_weights=[0.3, 0.7], warmup_steps=5,
        )  # fmt: skip
        trainer = GFlowNetTrainer(
            llama(len(tokenizer)),
            [GroundTruthReward(), CollaborativeReward(teacher)],
            args,
            Dataset.from_dict(rows),
            processing_class=tokenizer,
            catalog=catalog,
            sampler=METHODS[method] and build_sampler(METHODS[method], teacher),
            callbacks=[clock],
        )
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer.train()
    counted = clock.seconds[WARM_UP:]
    return {
        "method": method, "items": items, "batch": batch, "seconds_to_build": built,
        "seconds_a_step": statistics.median(counted), "slowest_step": max(counted),
        "peak_memory": peak(torch.device("cpu")), "warnings": sorted({str(one.message)[:200] for one in found}),
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--only", nargs=2, metavar=("METHOD", "ITEMS"), help="measure one row and print it as JSON")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only[0], int(given.only[1]), given.steps, given.batch)))
        return
    rows = []
    for method in METHODS:
        for items in given.items:
            rows.append(in_own_process("--only", method, str(items)))
            print(rows[-1], flush=True)
    columns = {
        "loss": "`{method}`", "items": "{items:,}", "tree and tokenizer, s": "{seconds_to_build:.1f}",
        "s per step": "{seconds_a_step:.2f}", "slowest": "{slowest_step:.2f}", "peak memory, GiB": "{gib:.2f}",
    }  # fmt: skip
    report([{**row, "gib": row["peak_memory"] / 2**30} for row in rows], columns, given, steps=given.steps)


if __name__ == "__main__":
    main()
