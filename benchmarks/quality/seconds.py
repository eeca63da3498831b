"""NDCG@10 over training time: SASRec, SFT, exact flows with separate and with whole rows, and cross entropy.

    OMP_NUM_THREADS=1 python benchmarks/quality/seconds.py --data_dir DIR --seeds 42 43 44 \
        --out benchmarks/results/quality/seconds.json

The first seed also runs the recipe as it was before whole rows: teacher, SFT, two epochs of exact flows with separate
rows. Every seed runs exact flows with whole rows from random weights with the same teacher, and cross entropy on the
same rows: with the same number of visits, and with as many epochs as take the same seconds. Seconds are CPU seconds of
the training steps only. Validation users are measured after every epoch, test users at the end. Uses one thread.
"""

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

import matplotlib
import torch
from transformers import TrainerCallback


ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from benchmarks.quality.total_variation import environment  # noqa: E402
from gflowtrl import GFlowNetTrainer  # noqa: E402
from gflowtrl.pipeline import load_recipe, run  # noqa: E402


SHOWN = ("recall@10", "ndcg@10", "coverage@10")
WAYS = ["before", "whole", "controls"]
NAMES = {
    "teacher": "SASRec",
    "sft": "SFT",
    "separate": "exact flows, separate rows",
    "whole": "exact flows, whole rows",
    "visits": "cross entropy, whole rows, same visits",
    "seconds": "cross entropy, whole rows, same seconds",
}


class Clock(TrainerCallback):
    """Measures the CPU seconds of the training steps of each stage, and records evaluations over time.

    Attributes:
        spent: CPU seconds of each stage.
        curves: pairs of seconds and NDCG@10 on the validation split, for each stage.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.curves: dict[str, list[tuple[float, float]]] = {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        stage = stage_of(args)
        self.spent[stage] = self.spent.get(stage, 0.0) + time.process_time() - self.start

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        stage = stage_of(args)
        self.curves.setdefault(stage, []).append((self.spent.get(stage, 0.0), (metrics or {})["eval_ndcg@10"]))


def stage_of(args) -> str:
    return Path(args.output_dir).parent.name.rpartition("-")[0]


def measured(name: str, given: argparse.Namespace, seed: int, *options: str) -> tuple[dict, Clock]:
    """Run a recipe and return its results and the clock of its stages."""
    common = ["--data_dir", given.data_dir, "--seed", str(seed), "--output_dir", str(given.output_dir / str(seed))]
    common += ["--evaluation.calibration_rows", "0"]
    clock = Clock()
    return run(load_recipe(ROOT / "recipes" / f"{name}.yaml", [*common, *options]), callbacks=[clock]), clock


def row(seed: int, way: str, results: dict, stage: str, clock: Clock | None = None, before: float = 0.0) -> dict:
    """Return the results of one way to train. Its curve starts after the seconds of the stage that it continues."""
    metrics = results["methods"][stage]["metrics"]
    entry = {"seed": seed, "way": way, **{f"test_{name}": metrics[name] for name in SHOWN}}
    if clock is None:
        return entry | {"curve": []}
    curve = [[before + seconds, value] for seconds, value in clock.curves[stage]]
    return entry | {"seconds": before + clock.spent[stage], "curve": curve}


def as_before(given: argparse.Namespace, seed: int) -> list[dict]:
    """Train the teacher, SFT, and exact flows with separate rows."""
    GFlowNetTrainer.shares_prompts = False
    options = ["--stages", "teacher", "sft", "gflownet", "--sft.eval_delay", "0"]
    results, clock = measured("gflowgr_office_llama", given, seed, *options)
    GFlowNetTrainer.shares_prompts = True
    teacher = row(seed, "teacher", results, "teacher") | {"seconds": teacher_seconds(results)}
    flows = row(seed, "separate", results, "gflownet", clock, clock.spent["sft"])
    return [teacher, row(seed, "sft", results, "sft", clock), flows]


def teacher_seconds(results: dict) -> float:
    """Return the wall-clock seconds of fitting the teacher: one thread, no waiting."""
    return results["methods"]["teacher"]["seconds"]


def whole(given: argparse.Namespace, seed: int) -> list[dict]:
    """Train exact flows with whole rows from random weights."""
    results, clock = measured("gflowgr_office_llama_scratch", given, seed, "--stages", "teacher", "gflownet")
    entry = row(seed, "whole", results, "gflownet", clock)
    return [entry | {"epochs": results["recipe"]["gflownet"]["num_train_epochs"], "teacher": teacher_seconds(results)}]


def controls(given: argparse.Namespace, seed: int, known: list[dict]) -> list[dict]:
    """Train cross entropy on the same rows: for as many visits as exact flows, and for as many seconds."""
    flows = next(entry for entry in known if (entry["seed"], entry["way"]) == (seed, "whole"))
    results, clock = measured("gflowgr_office_llama_scratch", given, seed, "--stages", "control")
    visits = row(seed, "visits", results, "control", clock) | {"epochs": flows["epochs"]}
    longer = round(flows["epochs"] * flows["seconds"] / visits["seconds"])
    options = ["--stages", "control", "--control.num_train_epochs", str(longer)]
    results, clock = measured("gflowgr_office_llama_scratch", given, seed, *options)
    return [visits, row(seed, "seconds", results, "control", clock) | {"epochs": longer}]


def table(rows: list[dict]) -> str:
    lines = ["| | seed | seconds | Recall@10 | NDCG@10 | coverage@10 |", "|---|---:|---:|---:|---:|---:|"]
    for entry in sorted(rows, key=lambda entry: list(NAMES).index(entry["way"])):
        values = " | ".join(f"{entry[f'test_{name}']:.4f}" for name in SHOWN)
        lines.append(f"| {NAMES[entry['way']]} | {entry['seed']} | {entry['seconds']:.0f} | {values} |")
    return "\n".join(lines)


def draw(rows: list[dict], file: Path) -> None:
    """Plot the curves of the first seed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for entry in rows:
        if entry["seed"] == rows[0]["seed"] and entry["curve"]:
            axes.plot(*zip(*entry["curve"], strict=True), marker="o", markersize=3, label=NAMES[entry["way"]])
    axes.set(xlabel="seconds of training (one thread, without the teacher's)", ylabel="NDCG@10, validation")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the folder of the data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="what to run")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/seconds"), help="folder of the stages")
    parser.add_argument("--out", type=Path, help="JSON file for the results; the figure is written next to it")
    given = parser.parse_args()
    kept = given.out is not None and given.out.is_file()
    rows: list[dict] = json.loads(given.out.read_text())["rows"] if kept else []
    for seed in given.seeds:
        new = as_before(given, seed) if "before" in given.ways and seed == given.seeds[0] else []
        new += whole(given, seed) if "whole" in given.ways else []
        new += controls(given, seed, rows + new) if "controls" in given.ways else []
        done = {(entry["seed"], entry["way"]) for entry in new}
        rows = [entry for entry in rows if (entry["seed"], entry["way"]) not in done] + new
        print(f"\n{table(rows)}\n", flush=True)
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            report = {"date": date.today().isoformat(), "threads": torch.get_num_threads(), **environment()}
            given.out.write_text(json.dumps({**report, "rows": rows}, indent=2) + "\n", encoding="utf-8")
            draw(rows, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
