"""Pictures of a run: what every method reaches, accuracy against breadth, for whom, and how training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot_run(
    results: Mapping[str, Any], logs: Mapping[str, list[dict]], titles: Mapping[str, str], folder: Path
) -> None:
    """Writes `accuracy_vs_coverage.png`, `metrics.png`, `recall_by_popularity.png` and, where something was trained,
    `training.png`.

    Args:
        results: content of `results.json`.
        logs: the Trainer's log of each training stage, by method.
        titles: what methods are called.
        folder: where to.
    """
    ks = results["recipe"]["evaluation"]["ks"]
    k = 10 if 10 in ks else max(ks)
    kind = "SYNTHETIC data" if results["data"]["synthetic"] else "test split"
    name = f"{results['recipe']['name']}: {kind}"
    methods = results["methods"]
    pictures = {
        "accuracy_vs_coverage": lambda axes: _accuracy_against_breadth(axes, methods, titles, k),
        "metrics": lambda axes: _metrics(axes, methods, titles, k),
        "recall_by_popularity": lambda axes: _by_popularity(axes, methods, titles, k),
    }
    for file, draw in pictures.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(name)
        figure.savefig(folder / f"{file}.png", dpi=150)
    if logs:
        _training(logs, titles, results["recipe"]["name"], f"eval_ndcg@{k}", folder / "training.png")


def _accuracy_against_breadth(axes: Axes, methods: Mapping[str, Any], titles: Mapping[str, str], k: int) -> None:
    for method, entry in methods.items():
        x, y = entry["metrics"][f"coverage@{k}"], entry["metrics"][f"ndcg@{k}"]
        axes.errorbar(x, y, 1.96 * entry["standard_errors"][f"ndcg@{k}"], fmt="o", capsize=3)
        axes.annotate(titles[method], (x, y), textcoords="offset points", xytext=(6, 6))
    axes.set(xlabel=f"coverage@{k}", ylabel=f"NDCG@{k} (bars: 95 %)")
    axes.margins(0.25)


def _metrics(axes: Axes, methods: Mapping[str, Any], titles: Mapping[str, str], k: int) -> None:
    names = [f"recall@{k}", f"ndcg@{k}", f"mrr@{k}"]
    width = 0.8 / len(methods)
    for number, (method, entry) in enumerate(methods.items()):
        places = [place + (number - (len(methods) - 1) / 2) * width for place in range(len(names))]
        errors = [1.96 * entry["standard_errors"][name] for name in names]
        heights = [entry["metrics"][name] for name in names]
        axes.bar(places, heights, width, yerr=errors, capsize=2, label=titles[method])
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("test split (bars: 95 %)")
    axes.legend(fontsize="small")


def _by_popularity(axes: Axes, methods: Mapping[str, Any], titles: Mapping[str, str], k: int) -> None:
    for method, entry in methods.items():
        values = [float("nan") if mean is None else mean for mean in entry["recall_by_popularity"]]
        axes.plot(range(1, len(values) + 1), values, marker="o", label=titles[method])
    axes.set(xlabel="popularity of the target: groups of equal interactions, 1 the rarest items", ylabel=f"Recall@{k}")
    axes.legend(fontsize="small")


def _training(logs: Mapping[str, list[dict]], titles: Mapping[str, str], name: str, chosen: str, file: Path) -> None:
    """Losses, with their parts where there are several, and the metric that chooses the checkpoint."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, log in logs.items():
        parts = sorted({key for entry in log for key in entry if key.startswith("loss/")})
        for key in ["loss", *(parts if len(parts) > 1 else [])]:
            label = titles[method] if key == "loss" else f"{titles[method]}, {key.removeprefix('loss/')}"
            left.plot(*_series(log, key), label=label, linestyle="-" if key == "loss" else "--")
        right.plot(*_series(log, chosen), marker="o", label=titles[method])
    left.set(xlabel="step of the stage", ylabel="loss", title=name)
    right.set(xlabel="step of the stage", ylabel=f"{chosen.removeprefix('eval_')}, validation")
    for axes in (left, right):
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def _series(log: Sequence[Mapping[str, Any]], key: str) -> tuple[list, list]:
    points = [(entry["step"], entry[key]) for entry in log if key in entry and "step" in entry]
    return [step for step, _ in points], [value for _, value in points]
