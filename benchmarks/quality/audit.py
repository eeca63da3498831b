"""The audit: the paper's method and its rivals under one roof, from the same checkpoint and for the same steps.

    OMP_NUM_THREADS=1 python benchmarks/quality/audit.py reading --data_dir DIR --seeds 42
    OMP_NUM_THREADS=1 python benchmarks/quality/audit.py office --data_dir DIR --minutes 100

A cell is a row of a study with a seed. Each runs in a process of its own, is resumed after an interruption, and writes
benchmarks/results/quality/audit-STUDY-ROW-seedSEED.json: the record of office.py with the validation metric of the
chosen checkpoint, the survival of prefixes in beam search, and the peak memory, unless the cell was resumed or trains
the shared stages. Cells with a record of the same recipe are not repeated. With --minutes, no cell starts after that
time, for work in blocks. At the end, the table of the finished cells is printed; differences are relative to the
control of the study's first row.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from office import KEPT, difference, gains, kept_run, make_parser, places, settings
from safetensors.torch import load_file
from studies import STUDIES, register_losses
from tqdm.auto import tqdm

from gflowtrl.metrics import prefix_metrics
from gflowtrl.pipeline import load_recipe, run
from gflowtrl.pipeline.comparison import spread
from gflowtrl.pipeline.run_data import RunData, prepare
from gflowtrl.pipeline.run_report import aligned
from gflowtrl.policy import load_backbone, make_policy


USERS = 1000  # test users whose prefixes are measured
METRICS = {
    "Recall@10": "item_recall@10",
    "NDCG@10": "item_ndcg@10",
    "Recall@10, seen removed": "unseen_item_recall@10",
    "NDCG@10, seen removed": "unseen_item_ndcg@10",
    "coverage@10": "coverage@10",
}
SHARED = {"teacher": "SASRec, the teacher", "sft": "SFT, the checkpoint", "control": "cross entropy (control)"}
EXPOSED = {"NDCG@5, exposed": "ndcg@5", "AUC, exposed": "auc"}


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
    begun = Path(given.output_dir, f"{file.stem}.begun")  # exists from here to the end of the cell
    resumed = begun.exists()
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.touch()
    record = kept_run(row.recipe, options, file)
    if "survival" in record:
        begun.unlink()
        return
    recipe = load_recipe(row.recipe, options)
    run_data = prepare(recipe)
    methods = run(recipe, run_data, quiet=True)["methods"]
    first = next(iter(STUDIES[study])) == name  # its record has the shared stages
    wanted = [method for method in row.stages if method != "teacher"] if first else ["gflownet"]
    beams = recipe.evaluation.num_beams
    record["survival"] = {
        method: prefixes(methods[method]["model"], run_data, USERS, beams, f"{file.stem}, {method}")
        for method in wanted
    }
    if not resumed and not first:  # otherwise of another part of the work
        record["peak_memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file.write_text(json.dumps(record | {"resumed": resumed}, indent=2) + "\n", encoding="utf-8")
    begun.unlink()


def is_done(study: str, name: str, seed: int, others: Sequence[str] = ()) -> bool:
    """Whether a cell of today's recipe has a record with all its parts; the survival of prefixes is the last one."""
    file, row = record_file(study, name, seed), STUDIES[study][name]
    record = json.loads(file.read_text()) if file.is_file() else {}
    recipe = load_recipe(row.recipe, ["--seed", str(seed), *row.options, *others])
    return "survival" in record and settings(record["recipe"]) == settings(recipe.as_dict())


def table(
    study: str, seeds: Sequence[int], order: str = "NDCG@10", others: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Return the lines of a study's methods that are finished for these seeds, each by column.

    Figures are means over the seeds with their standard deviation; differences to the control have the interval of
    `difference`. They count semantic ids, so methods with other ids (LETTER) have none. The methods are sorted by the
    column `order`, the best one first.
    """
    register_losses()
    done = [name for name in STUDIES[study] if all(is_done(study, name, seed, others) for seed in seeds)]
    files = {name: [record_file(study, name, seed) for seed in seeds] for name in done}
    shared = next(iter(STUDIES[study]))
    if shared not in files:
        raise SystemExit(f"The row {shared} of the study {study}, which has the control, is not finished.")
    data = json.loads(files[shared][0].read_text())["recipe"]["data"]
    controls = gains_of(files[shared], "control")
    lines = [
        cells(SHARED.get(method, STUDIES[study][name].title), method, found, data, controls)
        for name, found in files.items()
        for method in (STUDIES[study][name].stages if name == shared else ["gflownet"])
    ]
    return sorted(lines, key=lambda line: line[order], reverse=True)


def gains_of(files: Sequence[Path], method: str) -> list[dict[str, torch.Tensor]]:
    """Return the gains of each user, one per seed."""
    return [gains(load_file(file.with_suffix(".safetensors"))[method]) for file in files]


def cells(title: str, method: str, files: Sequence[Path], data: dict, controls: list[dict]) -> dict[str, str]:
    """Return a line of the table by column. `data` and `controls` are of the control: its section `data` and gains."""
    records = [json.loads(file.read_text()) for file in files]
    entries = [record["methods"][method] for record in records]
    best = [next(iter(entry.get("best_metric", {}).values()), None) for entry in entries]
    line = {"method": title, "validation NDCG@10": "" if None in best else spread(best)}
    for name, metric in METRICS.items():
        line[name] = spread([entry["metrics"][metric] for entry in entries])
    trained = method != "teacher"
    line["kept"] = spread([record["survival"][method]["survival@2"] for record in records], 3) if trained else ""
    timed = trained and not (method == "gflownet" and any(record.get("resumed") for record in records))
    line["minutes"] = spread([entry["seconds"] / 60 for entry in entries], 1) if timed else ""
    peaks = [record["peak_memory"] / 2**30 for record in records if "peak_memory" in record]
    line["GiB"] = spread(peaks, 2) if method == "gflownet" and len(peaks) == len(records) else ""
    for name, metric in EXPOSED.items() if "exposed" in records[0] else ():
        line[name] = spread([record["exposed"]["methods"][method]["metrics"][metric] for record in records], 3)
    ours, compared = gains_of(files, method), method != "control" and records[0]["recipe"]["data"] == data
    for name in ("Recall@10", "NDCG@10"):
        line[f"{name} minus control"] = difference(ours, controls, name.lower()) if compared else ""
    return line


def main() -> None:
    register_losses()
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
        if is_done(given.study, name, seed, others):
            continue
        if time.monotonic() - start > 60 * given.minutes:
            print(f"{given.minutes:g} minutes are over; start again to continue with {name}, seed {seed}.")
            break
        print(f"\n{given.study}: {name}, seed {seed}", flush=True)
        subprocess.run([sys.executable, *sys.argv, "--cell", name, str(seed)], check=True)
    lines = table(given.study, given.seeds, others=others)
    print(f"\n{aligned([[*lines[0]], *([*line.values()] for line in lines)])}")


if __name__ == "__main__":
    main()
