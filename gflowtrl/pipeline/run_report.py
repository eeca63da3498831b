"""The report of a run: a table, intervals, results.json and figures."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gflowtrl.metrics import group_means, mean_and_error, paired_bootstrap, popularity_groups, primary_cutoff

from .evaluation import per_user
from .exposed import exposed_headings, exposed_lines, exposed_title
from .plots import NAMES, main_metrics, metric_title, plot_run, titles_of
from .run_data import RunData
from .stage import Stage, write_json


#: Entries of a training stage's record that the results contain.
KEPT = ("steps", "rows_per_step", "windows", "best_step", "best_metric", "seconds", "reward_weights")
PACKAGES = ("gflowtrl", "torch", "transformers", "trl", "accelerate", "datasets", "numpy")


def collect(
    data: RunData,
    trained: Mapping[str, Stage],
    tested: Mapping[str, Stage],
    seconds: Mapping[str, float],
    teacher_seconds: float,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything about a run as one JSON-able value.

    Args:
        trained: training stages by method, without the teacher.
        tested: test stages by method.
        seconds: of each stage, by the name of its folder.
        teacher_seconds: of fitting the recipe's own teacher.
        calibration: the result of `measure_calibration`, if any.
    """
    recipe, k = data.recipe, data.recipe.evaluation.primary_k
    of_item = popularity_groups(data.item_counts)
    groups, count = of_item[data.catalog.index_of(data.test["target"])], int(of_item.max()) + 1
    methods = {}
    for method, stage in tested.items():
        record = stage.record
        by_group = group_means(per_user(stage)[f"item_recall@{k}"], groups, count)
        methods[method] = {
            "metrics": record["metrics"],
            "standard_errors": record["standard_errors"],
            "folder": str(stage.folder),
            "recall_by_popularity": [None if mean.isnan() else float(mean) for mean in by_group],
            "seconds": teacher_seconds,
        }
        if method in trained:
            training = trained[method].record
            methods[method] |= {name: training[name] for name in KEPT if name in training}
            methods[method]["model"] = str(trained[method].folder / "model")
    results = {
        "recipe": recipe.as_dict(),
        "data": {
            "summary": data.interactions.summary(),
            "synthetic": data.interactions.synthetic,
            "test_users": len(data.test),
            "leaves": data.catalog.tree.num_leaves,
            "fingerprint": data.fingerprint,
        },
        "methods": methods,
        "seconds": dict(seconds),
        **_environment(),
    }
    if {"gflownet", "control"} <= tested.keys():
        results["gflownet_minus_control"] = compare(data, tested["gflownet"], tested["control"], k)
    if not data.new_items.isdisjoint(data.test["target"]):
        results["new_items"] = _new_items(data, tested, k)
    if calibration is not None:
        results["calibration"] = calibration
    return results


def _new_items(data: RunData, tested: Mapping[str, Stage], k: int) -> dict[str, Any]:
    """Recall and NDCG of each method for the users whose target is a new item, and for the others."""
    of_new = torch.tensor([target in data.new_items for target in data.test["target"]])
    methods = {}
    for method, stage in tested.items():
        values = per_user(stage)
        methods[method] = {
            group: {name: mean_and_error(values[name][of_group]) for name in main_metrics(k)}
            for group, of_group in (("new", of_new), ("others", ~of_new))
        }
    return {"items": len(data.new_items), "users": int(of_new.sum()), "methods": methods}


def _environment() -> dict[str, Any]:
    """Versions, machine and date."""
    versions = {name: import_module(name).__version__ for name in PACKAGES}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def compare(data: RunData, first: Stage, second: Stage, k: int) -> dict[str, dict[str, float]]:
    """Paired bootstrap over test users of the difference of two methods, for each main metric."""
    a, b = per_user(first), per_user(second)
    names = main_metrics(k) + [n for n in ("unseen_liked_mass", "total_variation") if n in a]
    samples = data.recipe.evaluation.bootstrap_samples
    return {name: paired_bootstrap(a[name], b[name], samples=samples) for name in names}


def table(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table."""
    ks = results["recipe"]["evaluation"]["ks"]
    k = primary_cutoff(ks)
    names = [f"item_recall@{n}" for n in sorted(ks) if n < k] + main_metrics(k)
    shown = {metric_title(name): name for name in names}
    shown |= {f"coverage@{k}": f"coverage@{k}", f"entropy@{k}": f"entropy@{k}"}
    shown |= {f"Gini@{k}": f"gini@{k}", "long tail": f"long_tail@{k}"}
    if _truth_is_known(results):
        shown |= {title: name for name, title in NAMES.items()}
    titles, lines = titles_of(results["recipe"]), [["method", *shown, "train (s)"]]
    for method, entry in results["methods"].items():
        values = [f"{entry['metrics'][name]:.4f}" for name in shown.values()]
        lines.append([titles[method], *values, f"{entry['seconds']:.0f}"])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, headings first, as a Markdown table: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (padded[0], rule, *padded[1:]))


def interval_text(interval: Mapping[str, float]) -> str:
    """Mean and 95 % interval of a `metrics.paired_bootstrap`."""
    return f"{interval['mean_difference']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"


def text(results: Mapping[str, Any]) -> str:
    """The whole printed report."""
    recipe, data = results["recipe"], results["data"]
    temporal = recipe["data"].get("split") == "temporal"
    held_out = "their first items after a point in time" if temporal else "last item left out"
    lines = [
        f"Results of {recipe['name']!r}, seed {recipe['seed']}"
        + (" - SYNTHETIC data, not evidence about real users" if data["synthetic"] else ""),
        data["summary"],
        "",
        table(results),
        "",
        f"Test split, {data['test_users']:,} users, {held_out}; all items are candidates.",
        "seen removed: the items that the user had before the target are not candidates. Recall and NDCG count items: "
        "items with the same semantic id have an expected rank (docs/metrics.md).",
    ]
    for name, interval in results.get("gflownet_minus_control", {}).items():
        low, high = interval["low"], interval["high"]
        verdict = "no clear difference" if low <= 0 <= high else "higher" if low > 0 else "lower"
        lines.append(
            f"GFlowNet - control, {metric_title(name)}: {interval['mean_difference']:+.4f}, 95 % interval "
            f"[{low:+.4f}, {high:+.4f}] (paired bootstrap over users: {verdict})."
        )
    k = primary_cutoff(recipe["evaluation"]["ks"])
    name = f"snips_item_ndcg@{k}"
    if known := {method: entry for method, entry in results["methods"].items() if name in entry["metrics"]}:
        titles = titles_of(recipe)
        values = (
            f"{titles[m]} {entry['metrics'][name]:.4f} ± {entry['standard_errors'][name]:.4f}"
            for m, entry in known.items()
        )
        lines.append(f"item NDCG@{k} if all items had been shown equally often (SNIPS): {', '.join(values)}.")
    if _truth_is_known(results):
        lines.append(
            "Recall and NDCG count what was bought. Mostly popular items were shown, so both miss other good items."
        )
        lines.append("unseen liked: probability on items that a user likes and was never shown (higher is better).")
        lines.append("TV to truth: total variation to the user's true preference (lower is better).")
    if "new_items" in results:
        lines += [
            "",
            *_of_new_items(results["new_items"], titles_of(recipe), primary_cutoff(recipe["evaluation"]["ks"])),
        ]
    if "exposed" in results:
        lines += ["", *_exposed(results["exposed"], titles_of(recipe))]
    if "calibration" in results:
        lines += ["", *_calibration(results["calibration"], titles_of(recipe))]
    return "\n".join(lines)


def write(results: Mapping[str, Any], logs: Mapping[str, list[dict]], folder: Path) -> None:
    """Write `results.json`, `report.md` and the figures.

    Args:
        results: from `collect`.
        logs: the Trainer's log of each training stage, by method.
        folder: where to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plot_run(results, logs, folder)
    (folder / "report.md").write_text(text(results) + "\n", encoding="utf-8")
    write_json(folder / "results.json", results)


def _of_new_items(found: Mapping[str, Any], titles: Mapping[str, str], k: int) -> list[str]:
    names = main_metrics(k)[:2]
    lines = [["method", *(f"{metric_title(name)}, {group}" for group in ("new", "others") for name in names)]]
    for method, groups in found["methods"].items():
        means = [groups[group][name] for group in ("new", "others") for name in names]
        lines.append([titles[method], *(f"{mean:.4f} ± {error:.4f}" for mean, error in means)])
    return [
        f"New items: {found['items']:,} items do not occur in training. They are the targets of {found['users']:,} "
        f"test users (docs/exposure.md). All items are candidates.",
        "",
        aligned(lines),
    ]


def _exposed(found: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    lines = [["method", *exposed_headings()]]
    for method, entry in found["methods"].items():
        lines.append([titles[method], *exposed_lines(entry["metrics"], entry["standard_errors"])])
    differences = []
    for name, interval in found.get("gflownet_minus_control", {}).items():
        differences.append(f"GFlowNet - control, {exposed_title(name)}: {interval_text(interval)} (95 % interval).")
    return [
        f"Items that {found['users']:,} users were shown at random (docs/exposure.md):",
        "",
        aligned(lines),
        "",
        f"corrected: log-probability - {found['correction']:g} log({found['counts']} + 1).",
        *differences,
    ]


def _calibration(found: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    if "left_out" in found:
        return [f"Distance to R / Z left out: {found['left_out']}"]
    parts = ("training", "test")
    shown = [(part, name) for part in parts for name in ("total_variation", "jensen_shannon")]
    lines = [["policy", *(f"{title}, {part}" for part in parts for title in ("TV", "JS"))]]
    for method, entry in found["methods"].items():
        lines.append([titles[method], *(f"{entry[part][name]:.4f}" for part, name in shown)])
    return [
        f"Distance of each policy to {found['target']} (all {found['leaves']:,} leaves, {found['rows']} training and "
        f"{found['rows']} test rows):",
        "",
        aligned(lines),
        "",
        "TV: total variation, 0 to 1; JS: Jensen-Shannon divergence, nats; lower is closer. A reward that reads the "
        "target knows the target of a test row; a policy does not.",
    ]


def _truth_is_known(results: Mapping[str, Any]) -> bool:
    return all("total_variation" in entry["metrics"] for entry in results["methods"].values())
