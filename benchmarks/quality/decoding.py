"""Averages of several models, or of several views of a history, against single models: quality and cost.

    OMP_NUM_THREADS=1 python benchmarks/quality/decoding.py --data_dir DIR --models MODEL1 MODEL2
    OMP_NUM_THREADS=1 python benchmarks/quality/decoding.py --data_dir DIR --models MODEL1 MODEL2 --split test \\
        --averages "models 1-2"

Every average is compared with its own models: with the mean of their metrics for each user, and with the model of the
highest NDCG, which these same users choose. The intervals are paired over users. The first command measures the single
models, the averages of the first two, three, ... models, and all view sets with the first model. Choose on the
validation split, then give the choice to `--averages` on the test split. All figures are also measured with the items
removed that a user has had before; the time is that of both rankings.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from gflowtrl import Recommender
from gflowtrl.catalog import Item
from gflowtrl.data import leave_one_out, read_interactions
from gflowtrl.ensemble import Ensemble, View
from gflowtrl.metrics import paired_bootstrap
from gflowtrl.metrics.ranking_report import UNSEEN
from gflowtrl.pipeline.evaluation import earlier_items, measure_saved
from gflowtrl.pipeline.run_report import aligned, interval_text


VIEW_SETS = [
    "full last=10",
    "full last=5",
    "full last=10 last=5",
]
COLUMNS = {"": "kept", UNSEEN: "removed"}  # prefixes of metrics, and what happens to items that a user has had
METRICS = tuple(f"{prefix}{name}" for prefix in COLUMNS for name in ("item_recall@10", "item_ndcg@10"))
WARM_UP = 8  # users before the clock starts: the first use checks the model


@dataclass
class Task:
    """Rows of users, all items that each has had, and the number of training interactions of each item."""

    rows: Dataset
    earlier: list[list[Item]]
    counts: dict[Item, int]


def read_task(given: argparse.Namespace, models: Sequence[Recommender]) -> Task:
    """Read the users of a split; with `--users` a random part of them."""
    data = read_interactions(given.data_dir)
    splits = leave_one_out(data, max(model.max_history_items for model in models))
    rows = getattr(splits, given.split)
    if given.users is not None:
        rows = rows.shuffle(seed=0).select(range(min(given.users, len(rows))))
    counts = dict(zip(data.items, splits.item_counts.tolist(), strict=True))
    return Task(rows, earlier_items(data, rows), counts)


def measure(system: Recommender | Ensemble, task: Task, num_beams: int) -> tuple[dict, dict[str, Tensor]]:
    """Return the figures of a system, and its metrics per user."""
    few = task.rows.select(range(min(WARM_UP, len(task.rows))))
    measure_saved(system, few, task.earlier[: len(few)], task.counts, [10], num_beams)
    start, cpu_start = time.perf_counter(), time.process_time()
    report = measure_saved(system, task.rows, task.earlier, task.counts, [10], num_beams)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    figures = {name: report.metrics[name] for name in (*METRICS, *(f"{prefix}coverage@10" for prefix in COLUMNS))}
    thousands = len(task.rows) / 1000
    costs = {"seconds_per_1000_users": seconds / thousands, "cpu_seconds_per_1000_users": cpu_seconds / thousands}
    return {"metrics": figures, **costs}, {name: report.per_user[name] for name in METRICS}


def averages(models: Sequence[Recommender], view_sets: Sequence[str]) -> dict[str, tuple[list[int], str]]:
    """Return the averages by name: positions of their models, and their views."""
    found = {f"models 1-{count}": (list(range(count)), "full") for count in range(2, len(models) + 1)}
    found |= {f"model 1, views {views}": ([0], views) for views in view_sets}
    return found | {f"models 1-{len(models)}, views {v}": (list(range(len(models))), v) for v in view_sets}


def compared(chosen: dict[str, tuple[list[int], str]], models: list[Recommender], task: Task, num_beams: int) -> dict:
    """Measure the single models and the chosen averages; print the table after each."""
    results: dict[str, dict] = {}
    singles = []
    for number, model in enumerate(models, 1):
        results[f"model {number}"], gains = measure(model, task, num_beams)
        singles.append(gains)
    for name, (members, views) in chosen.items():
        ensemble = Ensemble([models[i] for i in members], views=[View.parse(view) for view in views.split()])
        results[name], gains = measure(ensemble, task, num_beams)
        best = max(members, key=lambda i: float(singles[i]["item_ndcg@10"].mean()))
        for metric in METRICS:
            mean = torch.stack([singles[i][metric] for i in members]).mean(0)
            for key, other in (("minus_mean", mean), ("minus_best", singles[best][metric])):
                results[name].setdefault(key, {})[metric] = paired_bootstrap(gains[metric], other)
        print(f"\n{table(results)}", flush=True)
    return results


def table(results: dict[str, dict]) -> str:
    """Return a Markdown table with two rows each: metrics, differences to the mean and best of the models, cost."""
    costs = {"seconds_per_1000_users": "s / 1,000 users", "cpu_seconds_per_1000_users": "CPU s / 1,000 users"}
    differences = {"Recall - mean": ("minus_mean", METRICS[0]), "NDCG - mean": ("minus_mean", METRICS[1])}
    differences["NDCG - best"] = ("minus_best", METRICS[1])
    names = (*METRICS[:2], "coverage@10")
    lines = [["recommender", "seen items", "item Recall@10", "item NDCG@10", "coverage@10", *differences]]
    lines[0] += costs.values()
    for name, entry in results.items():
        for prefix, kind in COLUMNS.items():
            cells = [f"{entry['metrics'][prefix + metric]:.4f}" for metric in names]
            cells += [interval_text(entry[key][prefix + m]) if key in entry else "" for key, m in differences.values()]
            spent = [f"{entry[cost]:.1f}" for cost in costs] if not prefix else ["", ""]
            lines.append([name, kind, *cells, *spent])
    return aligned(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the folder of the data")
    parser.add_argument("--models", required=True, nargs="+", help="folders of recommenders of the same items")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--view_sets", nargs="*", default=VIEW_SETS, help="each a list of views, separated by spaces")
    parser.add_argument("--averages", nargs="+", help='names in the table, as in "models 1-2"; by default those above')
    parser.add_argument("--num_beams", type=int, default=20)
    parser.add_argument("--users", type=int, help="measure only so many users, drawn at random")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    models = [Recommender.from_pretrained(folder) for folder in given.models]
    known = averages(models, given.view_sets)
    default = [name for name, (members, views) in known.items() if views == "full" or members == [0]]
    wanted = default if given.averages is None else given.averages
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"there is no average {unknown[0]!r}; choose among {', '.join(map(repr, known))}")
    task = read_task(given, models)
    results = compared({name: known[name] for name in wanted}, models, task, given.num_beams)
    print(f"\n{table(results)}")
    if given.out is not None:
        about = {"split": given.split, "users": len(task.rows), "num_beams": given.num_beams}
        about |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.platform()}
        about |= {"device": str(models[0].model.device), "threads": torch.get_num_threads()}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({**about, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
