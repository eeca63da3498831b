"""Training cost of each method: seconds per epoch and peak memory, from complete steps on the same batches.

    OMP_NUM_THREADS=1 python benchmarks/speed/methods.py --data_dir DIR --output_dir outputs/office_llama \
        --recipes recipes/gflowgr_office_llama.yaml benchmarks/quality/recipes/*.yaml

The trainers are those of the recipes' GFlowNet stages and start from the same models (teacher and SFT are trained in
--output_dir if they do not exist). The trainers take turns. The time of a step is the mean over all batches of a round
except the first, and then the median over the rounds. Evaluation is not included.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from measuring import arguments, peak, report, reset_peak, synchronize
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from gflowtrl.pipeline import load_recipe
from gflowtrl.pipeline.build import fit_teacher, needs_teacher
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.pipeline.stage import RunContext
from gflowtrl.pipeline.training import gflownet_trainer, train_sft


class RoundClock(TrainerCallback):
    """Measures the mean seconds of all steps of a training except the first, and the peak memory of all steps."""

    def __init__(self, device):
        self.device, self.rounds, self.memory = device, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.before, self.seconds = reset_peak(self.device), []
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.start)

    def on_train_end(self, args, state, control, **kwargs):
        self.rounds.append(statistics.mean(self.seconds))
        self.memory.append(peak(self.device) - self.before)


def build(recipe_file: Path, given, scratch: str) -> tuple[str, Trainer, RoundClock]:
    """Return the trainer of a recipe's GFlowNet stage; it trains for `given.steps` without evaluation or logging."""
    recipe = load_recipe(recipe_file, ["--data_dir", given.data_dir, "--output_dir", given.output_dir])
    run_data, context = prepare(recipe), RunContext(given.output_dir, quiet=True)
    teacher = fit_teacher(context, run_data, recipe.teacher) if needs_teacher(recipe) else None
    start = train_sft(context, run_data) if recipe.start == "sft" else None
    trainer = gflownet_trainer(context, run_data, start, teacher, Path(scratch, recipe.name))
    trainer.args.max_steps, trainer.args.load_best_model_at_end = given.steps, False
    trainer.args.eval_strategy = trainer.args.save_strategy = trainer.args.logging_strategy = "no"
    clock = RoundClock(given.device)
    trainer.add_callback(clock)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return recipe.name, trainer, clock


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", default="outputs/office_llama")
    parser.add_argument("--recipes", nargs="+", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=17, help="steps per round; the first one is not counted")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        built = [build(file, given, scratch) for file in given.recipes]
        for _ in tqdm(range(given.rounds), disable=not sys.stderr.isatty()):
            for _, trainer, _ in built:
                trainer.train()
        for name, trainer, clock in built:
            seconds = statistics.median(clock.rounds)
            steps = len(trainer.train_dataset) / (trainer.args.train_batch_size * trainer.args.world_size)
            rows.append({
                "method": name, "loss": " + ".join(trainer.args.loss_type), "K": trainer.num_generations,
                "seconds_a_step": seconds, "seconds_an_epoch": seconds * steps, "peak_memory": max(clock.memory),
            })  # fmt: skip
    columns = {
        "method": "{method}", "loss": "`{loss}`", "K": "{K}", "s per step": "{seconds_a_step:.3f}",
        "s per epoch": "{seconds_an_epoch:.0f}", "peak memory, MB": "{megabytes:.0f}",
    }  # fmt: skip
    report([{**row, "megabytes": row["peak_memory"] / 1e6} for row in rows], columns, given, steps=given.steps)


if __name__ == "__main__":
    main()
