"""The audit: the paper's method and its rivals under one roof, from the same checkpoint and for the same steps.

    OMP_NUM_THREADS=1 python benchmarks/quality/audit.py reading --data_dir DIR --seeds 42
    OMP_NUM_THREADS=1 python benchmarks/quality/audit.py reading --data_dir DIR --minutes 100

A cell is a row of a study with a seed. Each runs in a process of its own, is resumed after an interruption, and writes
benchmarks/results/quality/audit-STUDY-ROW-seedSEED.json: the record of office.py with the validation metric of the
chosen checkpoint, the survival of prefixes in beam search, and the peak memory. Cells with a record of the same recipe
are not repeated. With --minutes, no cell starts after that time, for work in blocks.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from comparison import prefixes
from office import KEPT, ROOT, kept_run, make_parser, places, settings

from gflowtrl.losses import LossSpec, register_loss, trajectory_balance
from gflowtrl.pipeline import load_recipe, run
from gflowtrl.pipeline.comparison import spread
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.pipeline.run_report import aligned


OWN = ROOT / "benchmarks" / "quality" / "recipes"
PAPER = ROOT / "recipes" / "gflowgr_paper.yaml"
USERS = 1000  # test users whose prefixes are measured
ALL = ("teacher", "sft", "control", "gflownet")  # stages

# For the ablation "balance over the vocabulary": pi is the model's softmax over all tokens, as in plain decoding.
register_loss("vocabulary_balance", LossSpec(trajectory_balance, any_label_space=True))


@dataclass(frozen=True)
class Row:
    """A row of a study: a recipe with options. Stages that rows share have their results in the study's first row."""

    title: str
    recipe: Path
    options: Sequence[str] = field(default=())
    stages: Sequence[str] = field(default=("sft", "gflownet"))


STANDARD = (
    "--rewards=[{type: ground_truth, weight: 10}, {type: collaborative, normalization: standard}, "
    "{type: token_similarity}]"
)
HARD = "--sampler={ground_truth: 1, hard: [{type: curriculum, pool: teacher, pool_size: 50}, 2]}"


def lambdas(value: float) -> list[str]:
    return ["--gflownet.loss_weights", "1.0", str(value)]


def beta(value: float) -> list[str]:
    return ["--gflownet.reward_beta", str(value)]


EXP = [STANDARD, "--gflownet.reward_transform", "exp"]
#: The readings of the paper's method that were tried on the validation split of Office.
READING = {
    "published": Row("R as published, lambda 1", PAPER, (), ALL),
    "lambda01": Row("the same, lambda .1", PAPER, lambdas(0.1)),
    "power2": Row("R^2, lambda .1", PAPER, [*lambdas(0.1), *beta(2)]),
    "power3": Row("R^3, lambda .1", PAPER, [*lambdas(0.1), *beta(3)]),
    "power5": Row("R^5, lambda .1", PAPER, [*lambdas(0.1), *beta(5)]),
    "exp05": Row("exp(.5 R), standardized scores, lambda .1", PAPER, [*EXP, *lambdas(0.1), *beta(0.5)]),
    "exp1": Row("exp(R), standardized scores, lambda .1", PAPER, [*EXP, *lambdas(0.1), *beta(1)]),
    "exp05_hard": Row("exp(.5 R), the teacher's best 50", PAPER, [*EXP, HARD, *lambdas(0.1), *beta(0.5)]),
    "exp1_hard": Row("exp(R), the teacher's best 50", PAPER, [*EXP, HARD, *lambdas(0.1), *beta(1)]),
    "exp05_hard_1": Row("the same at exp(.5 R), lambda 1", PAPER, [*EXP, HARD, *lambdas(1), *beta(0.5)]),
}
TITLES = {
    "cross_entropy": "cross entropy over the vocabulary",
    "msl": "MSL, temperature .7",
    "bear": "BEAR",
    "apao_pointwise": "APAO, pointwise",
    "apao_pairwise": "APAO, pairwise, beta .3",
    "dpo": "DPO",
    "sdpo": "S-DPO",
    "ipa": "IPA",
    "grpo": "GRPO as in ReRe",
    "grpo_trl": "GRPO as in TRL",
    "dapo": "DAPO",
    "dr_grpo": "Dr. GRPO",
    "gbpo": "GBPO",
    "vstar": "V-STAR without its decoder",
    "flowrl": "FlowRL",
    "gflowgr": "GFlowGR as published",
    "gflowgr_detailed_balance": "the same with detailed balance",
    "vargrad": "VarGrad",
    "vargrad_linex": "VarGrad, linex",
    "exact_flow": "exact flows",
    "letter": "cross entropy on LETTER's ids",
}
#: Every method from one SFT checkpoint, for the same number of steps.
METHODS_OF_OFFICE = {
    name: Row(title, OWN / "audit" / f"{name}.yaml", (), ALL if name == "cross_entropy" else ("sft", "gflownet"))
    for name, title in TITLES.items()
} | {
    "apao_gentle": Row(
        "APAO, pairwise, beta .1", OWN / "audit" / "apao_pairwise.yaml", ["--gflownet.loss_weights", "1.0", "0.1"]
    ),
    "vargrad_excluded": Row(
        "VarGrad, no reward for items of the history",
        OWN / "audit" / "vargrad.yaml",
        ["--gflownet.exclude_history", "auto"],
    ),
    "gflowgr_known": Row(
        "GFlowGR as published, known Z", OWN / "audit" / "gflowgr.yaml", ["--gflownet.flows", "known"]
    ),
}
STUDIES: dict[str, dict[str, Row]] = {"reading": READING, "office": METHODS_OF_OFFICE}


def record_file(study: str, name: str, seed: int) -> Path:
    return KEPT / f"audit-{study}-{name}-seed{seed}.json"


def run_cell(study: str, name: str, seed: int, given: argparse.Namespace, others: Sequence[str]) -> None:
    """Train and measure a cell, and write its record."""
    row, file = STUDIES[study][name], record_file(study, name, seed)
    options = [*places(given, seed), *row.options, "--evaluation.calibration_rows", "0", *others]
    options += ["--stages", *row.stages]
    record = kept_run(row.recipe, options, file)
    if "survival" in record:
        return
    recipe = load_recipe(row.recipe, options)
    run_data = prepare(recipe)
    methods = run(recipe, run_data, quiet=True)["methods"]
    wanted = [method for method in row.stages if method != "teacher"]
    beams = recipe.evaluation.num_beams
    record["survival"] = {
        method: prefixes(methods[method]["model"], run_data, USERS, beams, f"{file.stem}, {method}")
        for method in wanted
    }
    record["peak_memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_done(study: str, name: str, seed: int, given: argparse.Namespace, others: Sequence[str]) -> bool:
    """Whether a complete record of the same recipe exists."""
    file, row = record_file(study, name, seed), STUDIES[study][name]
    if not file.is_file():
        return False
    record = json.loads(file.read_text())
    recipe = load_recipe(row.recipe, [*places(given, seed), *row.options, *others])
    return "survival" in record and settings(record["recipe"]) == settings(recipe.as_dict())


def table(study: str, seeds: Sequence[int]) -> str:
    """Return the finished cells of a study as a Markdown table, means over the seeds."""
    columns = ["item_recall@10", "item_ndcg@10", "unseen_item_recall@10", "coverage@10"]
    lines = [["method", "validation NDCG@10", *columns, "survival@2", "minutes", "GiB"]]
    for name, row in STUDIES[study].items():
        files = [record_file(study, name, seed) for seed in seeds]
        records = [json.loads(file.read_text()) for file in files if file.is_file()]
        for method in ALL if records else ():
            entries = [record["methods"][method] for record in records if method in record["methods"]]
            if len(entries) < len(records) or (method != "gflownet" and method not in row.stages):
                continue
            best = [next(iter(entry.get("best_metric", {}).values()), None) for entry in entries]
            survival = [record["survival"][method]["survival@2"] for record in records if method != "teacher"]
            minutes = [entry["seconds"] / 60 for entry in entries if "seconds" in entry]
            memory = [record["peak_memory"] / 2**30 for record in records]
            lines.append([
                row.title if method == "gflownet" else method,
                "" if None in best else spread(best),
                *(spread([entry["metrics"][column] for entry in entries]) for column in columns),
                spread(survival, digits=3) if survival else "",
                spread(minutes, digits=1) if minutes else "",
                spread(memory, digits=2),
            ])  # fmt: skip
    return aligned(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--rows", nargs="+", help="names of the study's rows (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after this time")
    parser.add_argument("--cell", nargs=2, metavar=("ROW", "SEED"), help="run one cell in this process")
    given, others = parser.parse_known_args()
    rows = STUDIES[given.study] if given.rows is None else given.rows
    unknown = [name for name in rows if name not in STUDIES[given.study]]
    if unknown:
        parser.error(f"the study {given.study} has no row {unknown[0]!r}; rows: {', '.join(STUDIES[given.study])}")
    if given.cell:
        run_cell(given.study, given.cell[0], int(given.cell[1]), given, others)
        return
    start = time.monotonic()
    for seed, name in product(given.seeds, rows):
        if is_done(given.study, name, seed, given, others):
            continue
        if time.monotonic() - start > 60 * given.minutes:
            print(f"{given.minutes:g} minutes are over; start again to continue with {name}, seed {seed}.")
            break
        print(f"\n{given.study}: {name}, seed {seed}", flush=True)
        subprocess.run([sys.executable, *sys.argv, "--cell", name, str(seed)], check=True)
    print(f"\n{table(given.study, given.seeds)}")


if __name__ == "__main__":
    main()
