"""The audit: the paper's method and its rivals under one roof, from the same checkpoint and for the same steps.

    OMP_NUM_THREADS=1 python benchmarks/quality/audit.py reading --data_dir DIR --seeds 42
    OMP_NUM_THREADS=1 python benchmarks/quality/audit.py office --data_dir DIR --minutes 100

A cell is a row of a study with a seed. Each runs in a process of its own, is resumed after an interruption, and writes
benchmarks/results/quality/audit-STUDY-ROW-seedSEED.json: the record of office.py with the validation metric of the
chosen checkpoint, the survival of prefixes in beam search, and the peak memory. Cells with a record of the same recipe
are not repeated. With --minutes, no cell starts after that time, for work in blocks. At the end, the table of the
finished cells is printed; differences are relative to the control of the study's first row.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch
from office import KEPT, ROOT, difference, gains, kept_run, make_parser, places, settings
from safetensors.torch import load_file
from tqdm.auto import tqdm

from gflowtrl.losses import LossSpec, register_loss, trajectory_balance
from gflowtrl.metrics import prefix_metrics
from gflowtrl.pipeline import load_recipe, run
from gflowtrl.pipeline.comparison import spread
from gflowtrl.pipeline.run_data import RunData, prepare
from gflowtrl.pipeline.run_report import aligned
from gflowtrl.policy import load_backbone, make_policy


OWN = ROOT / "benchmarks" / "quality" / "recipes"
PAPER = ROOT / "recipes" / "gflowgr_paper.yaml"
USERS = 1000  # test users whose prefixes are measured
ALL = ("teacher", "sft", "control", "gflownet")  # stages
METRICS = {
    "Recall@10": "item_recall@10",
    "NDCG@10": "item_ndcg@10",
    "Recall@10, seen removed": "unseen_item_recall@10",
    "NDCG@10, seen removed": "unseen_item_ndcg@10",
    "coverage@10": "coverage@10",
}
EXPOSED = {"NDCG@5, exposed": "ndcg@5", "AUC, exposed": "auc"}


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
    "gflowgr_vocabulary": Row(
        "GFlowGR as published, balance over the vocabulary",
        OWN / "audit" / "gflowgr.yaml",
        ["--gflownet.loss_type", "[sft, vocabulary_balance]", "--gflownet.label_space", "vocabulary"],
    ),
}


def changed(names: Sequence[str], options: Sequence[str]) -> dict[str, Row]:
    """Some methods of the first study with further options."""
    found = {name: METHODS_OF_OFFICE[name] for name in names}
    return {name: replace(row, options=[*row.options, *options]) for name, row in found.items()}


ON_BEAUTY = ["cross_entropy", "msl", "apao_gentle", "sdpo", "grpo", "gflowgr", "vargrad", "exact_flow"]
ON_YAHOO = ["cross_entropy", "msl", "apao_gentle", "sdpo", "grpo", "gflowgr"]
OF_YAHOO = [  # data, model and schedule of recipes/gflowgr_yahoo.yaml
    *("--data.semantic_ids", "{quantizer: kmeans, collaborative: 1.0}"),
    *("--model.hidden_size", "64", "--model.intermediate_size", "256"),
    *("--model.num_hidden_layers", "2", "--model.num_attention_heads", "2"),
    *("--sft.num_train_epochs", "8", "--sft.eval_delay", "5", "--gflownet.num_train_epochs", "1"),
]
STUDIES: dict[str, dict[str, Row]] = {
    "reading": READING,
    "office": METHODS_OF_OFFICE,
    "beauty": changed(ON_BEAUTY, ["--gflownet.num_train_epochs", "1"]),
    "yahoo": changed(ON_YAHOO, OF_YAHOO),
}


@torch.no_grad()
def prefixes(folder: str, run_data: RunData, users: int, num_beams: int, progress: str) -> dict[str, float]:
    """Return the means of `prefix_metrics` over some test users, drawn with a fixed seed."""
    model = load_backbone(folder).eval()
    policy, rows = make_policy(model, run_data.catalog), run_data.test.shuffle(seed=0)
    rows = rows.select(range(min(users, len(rows))))
    found = []
    for start in tqdm(range(0, len(rows), 64), desc=progress, leave=False):
        part = rows[start : start + 64]
        leaf_log_probs = policy.leaf_log_probs(run_data.encoder(part["history"]))
        targets = run_data.catalog.leaf_of(part["target"])
        found.append(prefix_metrics(leaf_log_probs, targets, run_data.catalog.tree, num_beams))
    return {name: float(torch.cat([part[name] for part in found]).mean()) for name in found[0]}


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
    """Return the cells of a study that are finished for these seeds as a Markdown table.

    Figures are means over the seeds with their standard deviation; differences to the control have the interval of
    `difference`. The methods are sorted by NDCG@10.
    """
    files = {name: [record_file(study, name, seed) for seed in seeds] for name in STUDIES[study]}
    files = {name: found for name, found in files.items() if all(file.is_file() for file in found)}
    shared = next(iter(STUDIES[study]))
    if shared not in files:
        return "The first row of the study, which has the control, is not finished."
    lines = [
        cells(STUDIES[study][name].title if method == "gflownet" else method, method, found, files[shared])
        for name, found in files.items()
        for method in (ALL if name == shared else ["gflownet"])
    ]
    lines.sort(key=lambda line: line["NDCG@10"], reverse=True)
    return aligned([[*lines[0]], *([*line.values()] for line in lines)])


def cells(title: str, method: str, files: Sequence[Path], controls: Sequence[Path]) -> dict[str, str]:
    """Return a line of the table by column."""
    records = [json.loads(file.read_text()) for file in files]
    entries = [record["methods"][method] for record in records]
    best = [next(iter(entry.get("best_metric", {}).values()), None) for entry in entries]
    line = {"method": title, "validation NDCG@10": "" if None in best else spread(best)}
    for name, metric in METRICS.items():
        line[name] = spread([entry["metrics"][metric] for entry in entries])
    trained = method != "teacher"
    line["kept"] = spread([record["survival"][method]["survival@2"] for record in records], 3) if trained else ""
    line["minutes"] = spread([entry["seconds"] / 60 for entry in entries], 1) if trained else ""
    line["GiB"] = spread([record["peak_memory"] / 2**30 for record in records], 2) if method == "gflownet" else ""
    for name, metric in EXPOSED.items() if "exposed" in records[0] else ():
        line[name] = spread([record["exposed"]["methods"][method]["metrics"][metric] for record in records], 3)
    ours = [gains(load_file(file.with_suffix(".safetensors"))[method]) for file in files]
    theirs = [gains(load_file(file.with_suffix(".safetensors"))["control"]) for file in controls]
    for name in ("Recall@10", "NDCG@10"):
        line[f"{name} minus control"] = "" if method == "control" else difference(ours, theirs, name.lower())
    return line


def main() -> None:
    # For the ablation: pi is the model's softmax over all tokens, as in plain decoding.
    register_loss("vocabulary_balance", LossSpec(trajectory_balance, any_label_space=True))
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
