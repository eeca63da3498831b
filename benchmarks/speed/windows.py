"""An epoch of training with whole rows (windows) and with separate rows: CPU seconds, tokens and memory.

    OMP_NUM_THREADS=1 python benchmarks/speed/windows.py --data_dir DIR --out FILE.json

Uses the recipe's Llama, and an untrained SASRec as teacher. Complete steps of the trainer (forward, backward,
optimizer) run on the rows of every n-th user and are scaled to an epoch. Both sides compute the same prompts,
alternately for several rounds, each in its own process. CPU time is measured, so other programs have little effect.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
from measuring import arguments, office, report
from transformers import TrainerCallback, set_seed

from gflowtrl import GFlowNetConfig, GFlowNetTrainer
from gflowtrl.pipeline.models import build_model
from gflowtrl.rewards import CollaborativeReward, GroundTruthReward
from gflowtrl.teachers import SASRec


BATCH = 64
#: Maps a loss to the number of trajectories per prompt and the sampler.
CASES = {
    "sft": (1, "ground_truth"),
    "exact_flow": (4, {"ground_truth": 1, "reward": 3}),
    "vargrad": (8, {"ground_truth": 1, "reward": 3, "on_policy": 4}),
}


WAYS = ("separate", "windows")


class StepClock(TrainerCallback):
    """Measures CPU seconds and tokens of every step."""

    def __init__(self, model: torch.nn.Module):
        self.seconds: list[float] = []
        self.tokens: list[int] = [0]
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.tokens[-1] += kwargs["input_ids"].numel()

    def on_step_begin(self, args, state, control, **kwargs):
        self.tokens.append(0)
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.start)


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Return CPU seconds and tokens of an epoch, from the mean step without the first ones, and the peak memory."""
    run_data = office(given.data_dir)
    teacher = SASRec(run_data.interactions.items, given.history).eval()
    users = set(run_data.interactions.users[:: given.every])
    rows = run_data.splits.train.filter(lambda row: row["user"] in users)
    set_seed(0)
    model = build_model(run_data)
    clock, (count, sampler) = StepClock(model), CASES[given.loss]
    with tempfile.TemporaryDirectory() as scratch:
        args = GFlowNetConfig(
            scratch, loss_type=given.loss, num_generations=count, per_device_train_batch_size=BATCH, use_cpu=True,
            num_train_epochs=1, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            max_history_items=given.history,
        )  # fmt: skip
        rewards = None if given.loss == "sft" else [GroundTruthReward(), CollaborativeReward(teacher)]
        if rewards:
            args.reward_weights = [0.3, 0.7]
        trainer = GFlowNetTrainer(
            model, rewards, args, rows, callbacks=[clock], processing_class=run_data.tokenizer,
            catalog=run_data.catalog, sampler=sampler,
        )  # fmt: skip
        trainer.shares_prompts = given.way == "windows"
        trainer.train()
    steps = math.ceil(len(run_data.splits.train) / BATCH)
    return {
        "seconds": steps * sum(clock.seconds[2:]) / len(clock.seconds[2:]),
        "tokens": steps * sum(clock.tokens[3:]) / len(clock.tokens[3:]),
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def in_a_process(loss: str, way: str) -> dict[str, float]:
    """Run `measure` in a new process."""
    command = [sys.executable, *sys.argv, "--loss", loss, "--way", way]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--data_dir", required=True, help="the folder of the data")
    parser.add_argument("--every", type=int, default=12, help="use every n-th user")
    parser.add_argument("--history", type=int, default=20, help="maximum number of items in a prompt")
    parser.add_argument("--losses", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--loss", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way is not None:
        print(json.dumps(measure(given)))
        return
    rows = []
    for loss in given.losses:
        found = [[in_a_process(loss, way) for way in WAYS] for _ in range(given.rounds)]
        row = {"loss": loss, "K": CASES[loss][0]}
        for number, way in enumerate(WAYS):
            row |= {f"{name}_{way}": median(each[number][name] for each in found) for name in found[0][0]}
        row["ratio"] = median(windows["seconds"] / separate["seconds"] for separate, windows in found)
        rows.append(row)
    columns = {"loss": "`{loss}`", "K": "{K}"}
    for name, form in (("seconds", ".0f"), ("tokens", ",.0f"), ("gigabytes", ".2f")):
        columns |= {f"{name}, {way}": f"{{{name}_{way}:{form}}}" for way in WAYS}
    report(rows, columns | {"ratio of seconds": "{ratio:.2f}"}, given)


if __name__ == "__main__":
    main()
