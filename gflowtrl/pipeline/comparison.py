"""Several runs in one table: means over seeds, paired differences over users, a figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import Any

import torch

from gflowtrl.checks import FINITE, SEED, check_number, check_text
from gflowtrl.files import read_json, read_tensors, reading
from gflowtrl.metrics import paired_bootstrap

from .evaluation import PER_USER_FILE
from .plots import DPI, TITLES, metric_title, plot_differences, titles_of
from .recipe import control_section
from .training import result_fields


RESULTS_FILE = "results.json"
#: Fields of a recipe that do not distinguish settings. Data are compared by their fingerprint.
NO_SETTING = {"output_dir", "continue_from", "seed", "stages", "data", "evaluation"}
_SFT = {"data_dir", "model", "prompt", "peft", "sft"}
#: Fields of a recipe that a method depends on. The GFlowNet depends on all but the control's.
SETTINGS = {"teacher": {"data_dir", "teacher"}, "sft": _SFT, "control": _SFT | {"control"}}
#: What runs in one table have in common.
MEASURED_ALIKE: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "data": lambda result: result["data"]["fingerprint"],
    "evaluation.ks": lambda result: result["recipe"]["evaluation"]["ks"],
    "evaluation.num_beams": lambda result: result["recipe"]["evaluation"]["num_beams"],
    "evaluation.users": lambda result: result["data"]["test_users"],
}


@dataclass
class ComparedRow:
    """One method in one setting.

    Attributes:
        title: name in the table, unique.
        entries: the method's record in `results.json`, by seed.
    """

    title: str
    entries: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the seeds of the metrics that all seeds have. Records of older versions lack some."""
        first, *others = (entry["metrics"] for entry in self.entries.values())
        names = [name for name in first if all(name in other for other in others)]
        return {name: fmean(entry["metrics"][name] for entry in self.entries.values()) for name in names}

    def spread(self, metric: str) -> str:
        """Mean and standard deviation over the seeds, "" without the metric."""
        values = [entry["metrics"].get(metric) for entry in self.entries.values()]
        return "" if None in values else spread(values)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """The mean, with the standard deviation if there are several values."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.{digits}f}"


def find_results(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Read the results at these paths: `results.json` files, output folders with several runs, or run folders.

    Returns:
        The content of each file, with its path as `file` and the present paths of its test folders.

    Raises:
        FileNotFoundError: a path has no results.
        ValueError: a file does not hold the results of a run.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        inside = sorted(path.glob(f"report-*/{RESULTS_FILE}")) or list(path.glob(RESULTS_FILE))
        found = [path] if path.is_file() else inside
        if not found:
            raise FileNotFoundError(f"{path} has no {RESULTS_FILE} of a run; give the output_dir of a recipe.")
        files |= dict.fromkeys(file.resolve() for file in found)
    return [_read(file) for file in files]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"recipe", "data", "methods"} <= content.keys():
        raise ValueError(
            f"{file} is not the {RESULTS_FILE} of a run; give the output_dir of a recipe, or a file in it."
        )
    with reading(file, f"the {RESULTS_FILE} of a run"):
        for method, entry in content["methods"].items():
            # The path where the run was started; outputs may have been moved since.
            places = [Path(entry["folder"]), *(root / Path(entry["folder"]).name for root in file.parents[:2])]
            entry["folder"] = str(next((place.resolve() for place in places if place.is_dir()), places[0]))
            _check_entry(method, content["recipe"], entry)
        for value in MEASURED_ALIKE.values():
            value(content)
    return {**content, "file": str(file)}


def _check_entry(method: str, recipe: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """Raise an error of any kind if a table cannot be made of the record of a method."""
    check_number("recipe.seed", recipe["seed"], SEED)
    check_text("recipe.name", recipe["name"])
    json.dumps(_setting(method, recipe, entry), sort_keys=True)
    _free_title(method, recipe, entry, set())
    for name, value in entry["metrics"].items():
        if value is not None:
            check_number(f"metrics.{name} of {method}", value, FINITE)


def compared_rows(results: Sequence[Mapping[str, Any]]) -> list[ComparedRow]:
    """One row per setting of each method, over its seeds. A stage that recipes share counts once.

    If a title occurs again, for another setting or another run of the same setting and seed, it gets a `'`.

    Args:
        results: from `find_results`, or the return values of `run`.

    Raises:
        ValueError: the runs use different data or were measured differently.
    """
    _check_measured_alike(results)
    rows: dict[tuple[str, str], list[ComparedRow]] = {}  # by method and setting
    titles: set[str] = set()
    known: set[str] = set()
    for result in results:
        recipe = result["recipe"]
        for method, entry in result["methods"].items():
            if entry["folder"] in known:
                continue
            known.add(entry["folder"])
            setting = json.dumps(_setting(method, recipe, entry), sort_keys=True)
            alike = rows.setdefault((method, setting), [])
            row = next((row for row in alike if recipe["seed"] not in row.entries), None)
            if row is None:
                row = ComparedRow(_free_title(method, recipe, entry, titles))
                titles.add(row.title)
                alike.append(row)
            row.entries[recipe["seed"]] = entry
    return [row for title in TITLES for (method, _), alike in rows.items() if method == title for row in alike]


def _check_measured_alike(results: Sequence[Mapping[str, Any]]) -> None:
    for (one, other), (name, value) in product(pairwise(results), MEASURED_ALIKE.items()):
        if value(one) != value(other):
            raise ValueError(f"{_named(one)} and {_named(other)} differ in {name}, so they cannot be compared.")


def _named(result: Mapping[str, Any]) -> str:
    return result.get("file") or f"{result['recipe']['name']!r} of seed {result['recipe']['seed']}"


def _setting(method: str, recipe: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """All that the metrics of a method depend on, except data, evaluation and seed."""
    found = {name: recipe[name] for name in SETTINGS.get(method, recipe.keys() - NO_SETTING - {"control"})}
    start = recipe.get("start", "sft")
    if method in ("control", "gflownet"):
        found |= {"start": start, "sft": recipe["sft"] if start == "sft" else None}
    if method == "control":
        section = control_section(start, recipe["control"], recipe["gflownet"])
        found |= {"control": section, "steps": entry["steps"]}  # shown in the title
    found |= {name: result_fields(section) for name, section in found.items() if isinstance(section, Mapping)}
    if method != "teacher":  # the section data is compared by its fingerprint, in which this does not count
        found["augmentation"] = recipe["data"].get("augmentation")
    found["windows"] = bool(entry.get("windows"))  # missing in records of older versions
    return found | {"rows_per_step": entry.get("rows_per_step")}  # depends on the number of processes


def _free_title(method: str, recipe: Mapping[str, Any], entry: Mapping[str, Any], taken: set[str]) -> str:
    details = {"gflownet": f": {recipe['name']}", "control": f", {entry.get('steps')} steps"}
    title = titles_of(recipe)[method] + details.get(method, "")
    while title in taken:
        title += "'"
    return title


def difference(row: ComparedRow, other: ComparedRow, metric: str) -> dict[str, float] | None:
    """Paired bootstrap over users of `row` minus `other`, with each user's metrics averaged over their common seeds.

    None if they have no common seed, or if the files with the metrics of users are gone or lack this one.
    """
    seeds = row.entries.keys() & other.entries.keys()
    if not seeds or row is other:
        return None
    means = []
    for one in (row, other):
        files = [Path(one.entries[seed]["folder"], PER_USER_FILE) for seed in seeds]
        if not all(file.is_file() for file in files):
            return None
        values = [read_tensors(file).get(metric) for file in files]
        if any(value is None for value in values):
            return None
        for file, value in zip(files, values, strict=True):
            _check_users(file, metric, value, len(values[0]))
        means.append(torch.stack(values).double().mean(0))
    if len(means[0]) != len(means[1]):
        raise ValueError(
            f"The files {PER_USER_FILE} of {row.title} and {other.title} have different numbers of users."
        )
    return paired_bootstrap(*means)


def _check_users(file: Path, metric: str, values: torch.Tensor, users: int) -> None:
    if values.shape != (users,):
        raise ValueError(f"{file}: the shape of {metric!r} is {tuple(values.shape)}; it must be ({users},).")


def plot_comparison(
    rows: Sequence[ComparedRow],
    accuracy: str,
    breadth: str,
    file: Path,
    differences: Mapping[str, Mapping[str, float]] | None = None,
    against: str = "",
) -> None:
    """Plot accuracy against breadth, one marker per method; bars are standard deviations over seeds. A second panel
    shows the differences of `accuracy` to one row, if given.

    Args:
        rows: the methods.
        accuracy, breadth: names of metrics.
        file: the PNG to write.
        differences: title of a row to the result of `difference`.
        against: title of the row that the others are compared with.
    """
    from matplotlib.figure import Figure  # slow to import, rarely needed

    panels = 2 if differences else 1
    figure = Figure(figsize=(7 * panels, 4.5 + 0.15 * len(rows)), layout="constrained")
    axes, *right = figure.subplots(1, panels, squeeze=False)[0]
    for number, row in enumerate(rows):
        values = torch.tensor([[e["metrics"][name] for name in (breadth, accuracy)] for e in row.entries.values()])
        error = values.std(0).tolist() if len(values) > 1 else [0.0, 0.0]
        x, y = values.mean(0).tolist()
        marker, color = "os^Dv<>PX*"[number % 10], f"C{number % 10}"
        axes.errorbar(x, y, error[1], error[0], fmt=marker, color=color, capsize=3, label=row.title)
    axes.set(xlabel=metric_title(breadth), ylabel=metric_title(accuracy), title="Accuracy against breadth, test split")
    axes.margins(0.15)
    figure.legend(loc="outside lower left", ncols=panels, fontsize="small")  # never covers a marker
    for other in right:
        plot_differences(
            other, {fill(title, 24, break_long_words=False): found for title, found in differences.items()}
        )
        other.set(
            xlabel="95 % interval over users (filled: excludes 0)",
            title=f"{metric_title(accuracy)}: difference to {against}",
        )
    figure.savefig(file, dpi=DPI)
