"""Figures of a run: metrics of each method, accuracy against breadth, recall by popularity, training curves, and the
distance of the policies to R / Z."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gflowtrl.metrics import primary_cutoff
from gflowtrl.metrics.ranking_report import UNSEEN


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


TITLES = {"teacher": "Teacher", "sft": "SFT", "control": "SFT continued (control)", "gflownet": "GFlowNet"}
#: The control of a run that starts from an untrained model.
UNTRAINED_CONTROL = "Cross entropy (control)"
#: A method looks the same in all figures.
STYLES = {
    "teacher": {"color": "tab:gray", "marker": "s"},
    "sft": {"color": "tab:blue", "marker": "^"},
    "control": {"color": "tab:orange", "marker": "D"},
    "gflownet": {"color": "tab:green", "marker": "o"},
}
#: Names that the report uses for metrics whose keys are not readable.
NAMES = {"unseen_liked_mass": "unseen liked", "total_variation": "TV to truth"}
DPI = 150


def main_metrics(k: int) -> list[str]:
    """The main metrics of tables: of items, first with all items as candidates, then with seen items removed."""
    return [f"{prefix}item_{name}@{k}" for prefix in ("", UNSEEN) for name in ("recall", "ndcg")]


def metric_title(name: str) -> str:
    """Name of a metric in tables and figures: "item Recall@10", "item Recall@10, seen removed", "TV to truth"."""
    if name in NAMES:
        return NAMES[name]
    bare = name.removeprefix(UNSEEN)
    title = bare.replace("item_", "item ").replace("recall@", "Recall@").replace("ndcg@", "NDCG@")
    return title if bare == name else f"{title}, seen removed"


def titles_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Title of each method of a run; `recipe` is the one in `results.json`."""
    return TITLES if recipe.get("start", "sft") == "sft" else TITLES | {"control": UNTRAINED_CONTROL}


def plot_run(results: Mapping[str, Any], logs: Mapping[str, list[dict]], folder: Path) -> None:
    """Write `accuracy_vs_coverage.png`, `metrics.png` and `recall_by_popularity.png`.

    `training.png` is added if something was trained, `calibration.png` if policies were compared with R / Z.

    Args:
        results: content of `results.json`.
        logs: the Trainer's log of each training stage, by method.
        folder: where to write.
    """
    k = primary_cutoff(results["recipe"]["evaluation"]["ks"])
    recipe, synthetic = results["recipe"]["name"], results["data"]["synthetic"]
    name = f"{recipe}: SYNTHETIC data" if synthetic else f"{recipe}: test split"
    methods, titles = results["methods"], titles_of(results["recipe"])
    figures = {
        "accuracy_vs_coverage": _accuracy_against_breadth(methods, titles, k),
        "metrics": _metrics(methods, titles, k, results.get("gflownet_minus_control", {})),
        "recall_by_popularity": _by_popularity(methods, titles, k),
    }
    if logs:
        figures["training"] = _training(logs, titles, f"eval_ndcg@{k}")
    if "methods" in results.get("calibration", {}):
        figures["calibration"] = _calibration(results["calibration"], titles)
    for file, figure in figures.items():
        about = name if file not in ("training", "calibration") or synthetic else recipe
        figure.suptitle(about)
        figure.savefig(folder / f"{file}.png", dpi=DPI)


def plot_differences(axes: Axes, intervals: Mapping[str, Mapping[str, float]]) -> None:
    """Plot differences with their 95 % intervals, one per line. A marker is filled if the interval excludes zero.

    Args:
        intervals: label to the result of `metrics.paired_bootstrap`.
    """
    for row, interval in enumerate(intervals.values()):
        mean, low, high = interval["mean_difference"], interval["low"], interval["high"]
        clear = low > 0 or high < 0
        sides = [[max(mean - low, 0)], [max(high - mean, 0)]]  # with few resamples the interval may miss the mean
        axes.errorbar(
            mean, row, xerr=sides, fmt="o", capsize=4, color="black", markerfacecolor="black" if clear else "white"
        )
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # hides the line at zero
        axes.annotate(f"{mean:+.4f}", (mean, row), textcoords="offset points", xytext=(0, 8), ha="center", bbox=box)
    axes.axvline(0, color="tab:red", linewidth=1, zorder=0)
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.set_ylim(len(intervals) - 0.5, -0.6)
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=5)


def _accuracy_against_breadth(methods: Mapping[str, Any], titles: Mapping[str, str], k: int) -> Figure:
    figure, (axes,) = _figure(7)
    for method, entry in methods.items():
        x, y = entry["metrics"][f"coverage@{k}"], entry["metrics"][f"item_ndcg@{k}"]
        error = 1.96 * entry["standard_errors"][f"item_ndcg@{k}"]
        axes.errorbar(x, y, error, label=titles[method], linestyle="none", capsize=3, **STYLES[method])
    axes.margins(0.15)
    _name(axes, f"coverage@{k}", f"item NDCG@{k} (bars: 95 %)")
    return figure


def _metrics(
    methods: Mapping[str, Any], titles: Mapping[str, str], k: int, differences: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Bars of each method, and next to them the differences to the control. The users are the same, so an interval of
    the difference says more than overlapping bars."""
    figure, (axes, *right) = _figure(11 if differences else 7, 2 if differences else 1)
    names = main_metrics(k)
    width = 0.8 / len(methods)
    for number, (method, entry) in enumerate(methods.items()):
        positions = [x + (number - (len(methods) - 1) / 2) * width for x in range(len(names))]
        errors = [1.96 * entry["standard_errors"][name] for name in names]
        heights = [entry["metrics"][name] for name in names]
        color = STYLES[method]["color"]
        axes.bar(positions, heights, width, yerr=errors, capsize=2, label=titles[method], color=color)
    axes.set_xticks(range(len(names)), [metric_title(name).replace(", ", ",\n") for name in names])
    _name(axes, "", "mean over users (bars: 95 %)")
    for other in right:
        plot_differences(other, {metric_title(name): found for name, found in differences.items()})
        other.set_xlabel("GFlowNet - control, 95 % interval over users (filled: excludes 0)")
        other.set_title("Difference to the control")
    return figure


def _by_popularity(methods: Mapping[str, Any], titles: Mapping[str, str], k: int) -> Figure:
    figure, (axes,) = _figure(7)
    for method, entry in methods.items():
        values = [float("nan") if mean is None else mean for mean in entry["recall_by_popularity"]]
        axes.plot(range(1, len(values) + 1), values, label=titles[method], **STYLES[method])
    x = "popularity of the target: groups with equal numbers of interactions, 1: the rarest items"
    _name(axes, x, f"item Recall@{k}")
    return figure


def _training(logs: Mapping[str, list[dict]], titles: Mapping[str, str], chosen: str) -> Figure:
    """Losses, with their parts if there are several, and the metric that chooses the checkpoint."""
    figure, (left, right) = _figure(11, 2)
    for method, log in logs.items():
        parts = sorted({key for entry in log for key in entry if key.startswith("loss/")})
        color = STYLES[method]["color"]
        left.plot(*_series(log, "loss"), label=titles[method], color=color)
        for key, line in zip(parts if len(parts) > 1 else [], cycle(("--", ":", "-.")), strict=False):
            label = f"{titles[method]}, {key.removeprefix('loss/')}"
            left.plot(*_series(log, key), label=label, linestyle=line, color=color)
        right.plot(*_series(log, chosen), label=titles[method], **STYLES[method])
    _name(left, "step of the stage", "loss (each stage has its own)")
    _name(right, "step of the stage", f"{chosen.removeprefix('eval_')}, validation")
    return figure


def _calibration(calibration: Mapping[str, Any], titles: Mapping[str, str]) -> Figure:
    """Reliability diagrams: mean probability of the policies on leaves of a given R / Z."""
    figure, all_axes = _figure(11, 2)
    target = calibration["target"]
    for part, axes in zip(("training", "test"), all_axes, strict=True):
        wanted = []
        for method, entry in calibration["methods"].items():
            curve, distance = entry[part]["reliability"], entry[part]["total_variation"]
            label = f"{titles[method]}: TV {distance:.3f}"
            axes.plot(curve["target"], curve["policy"], label=label, markersize=4, **STYLES[method])
            wanted += curve["target"]
        ends = [min(wanted), max(wanted)]
        axes.plot(ends, ends, "k--", linewidth=1, label=f"{target} itself: TV 0", zorder=0)
        axes.loglog()
        axes.set_title(f"{calibration['rows']} {part} rows, all {calibration['leaves']:,} leaves")
        _name(axes, f"{target} of a leaf", "mean probability of the policy")
    return figure


def _name(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.legend(fontsize="small")


def _figure(width: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # slow to import, and rarely needed

    figure = Figure(figsize=(width, 4.5), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _series(log: Sequence[Mapping[str, Any]], key: str) -> tuple[list, list]:
    points = [(entry["step"], entry[key]) for entry in log if key in entry and "step" in entry]
    return [step for step, _ in points], [value for _, value in points]
