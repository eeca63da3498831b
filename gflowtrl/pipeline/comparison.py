"""Several runs in one table: means over seeds, differences over users, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from gflowtrl.metrics import paired_bootstrap

from .evaluation import PER_USER_FILE
from .plots import DPI, plot_differences
from .report import TITLES


RESULTS_FILE = "results.json"


@dataclass
class ComparedRow:
    """One method of one recipe.

    Attributes:
        title: what the table calls it.
        entries: its record in `results.json`, one a seed.
        seeds: the seeds, in the same order.
    """

    title: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def mean(self, metric: str) -> float:
        return sum(entry["metrics"][metric] for entry in self.entries) / len(self.entries)

    def spread(self, metric: str, digits: int = 4) -> str:
        """Mean, and standard deviation where there are several seeds."""
        values = torch.tensor([entry["metrics"][metric] for entry in self.entries], dtype=torch.double)
        text = f"{values.mean():.{digits}f}"
        return text if len(values) == 1 else f"{text} ± {values.std():.{digits}f}"


def find_results(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """All results at these places: `results.json` files, output folders with the runs kept in them, or run folders.

    Raises:
        FileNotFoundError: a place has no results.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(path.glob(f"report-*/{RESULTS_FILE}"))
        if not found and (path / RESULTS_FILE).is_file():
            found = [path / RESULTS_FILE]
        if not found:
            raise FileNotFoundError(f"{path} holds no {RESULTS_FILE} of a run; give the output_dir of a recipe.")
        files |= dict.fromkeys(file.resolve() for file in found)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def compared_rows(results: Sequence[Mapping[str, Any]]) -> list[ComparedRow]:
    """A row for each method; what recipes share (the same test folder) is there once.

    Raises:
        ValueError: the runs are of different data, or were measured differently.
    """
    for name, value in (
        ("data", lambda r: r["data"]["fingerprint"]),
        ("ks", lambda r: r["recipe"]["evaluation"]["ks"]),
    ):
        if len({json.dumps(value(result)) for result in results}) > 1:
            raise ValueError(f"The runs differ in their {name}, so that their figures cannot stand in one table.")
    rows: dict[str, ComparedRow] = {}
    known: set[str] = set()
    for result in results:
        recipe = result["recipe"]
        for method, entry in result["methods"].items():
            if entry["folder"] in known:
                continue
            known.add(entry["folder"])
            title = f"{TITLES[method]}: {recipe['name']}" if method == "gflownet" else TITLES[method]
            if method == "control":
                title += f", {entry['steps']} steps"
            while recipe["seed"] in rows.setdefault(title, ComparedRow(title)).seeds:  # the same name, another run
                title += "'"
            rows[title].entries.append(entry)
            rows[title].seeds.append(recipe["seed"])
    order = list(TITLES.values())
    return sorted(
        rows.values(), key=lambda row: min(n for n, title in enumerate(order) if row.title.startswith(title))
    )


def difference(row: ComparedRow, other: ComparedRow, metric: str) -> dict[str, float] | None:
    """Paired bootstrap over users of `row` minus `other`, each user's figures averaged over the seeds that both have;
    None where they share none, or the users' figures are not there any more."""
    seeds = [seed for seed in row.seeds if seed in other.seeds]
    if not seeds or row is other:
        return None
    means = []
    for one in (row, other):
        files = [Path(one.entries[one.seeds.index(seed)]["folder"], PER_USER_FILE) for seed in seeds]
        if not all(file.is_file() for file in files):
            return None
        means.append(torch.stack([load_file(file)[metric].double() for file in files]).mean(0))
    return paired_bootstrap(*means)


def plot_comparison(
    rows: Sequence[ComparedRow],
    accuracy: str,
    breadth: str,
    file: Path,
    differences: Mapping[str, Mapping[str, float]] | None = None,
    against: str = "",
) -> None:
    """Accuracy against breadth, a dot a method; bars are standard deviations over seeds. Beside it, where there are
    any, the differences of `accuracy` to one row.

    Args:
        rows: the methods.
        accuracy, breadth: metrics.
        file: where to, a PNG.
        differences: title of a row to what `difference` gives.
        against: the title of the row that the others are compared with.
    """
    panels = 2 if differences else 1
    figure = Figure(figsize=(7 * panels, 4.5 + 0.15 * len(rows)), layout="constrained")
    axes, *beside = figure.subplots(1, panels, squeeze=False)[0]
    for number, row in enumerate(rows):
        values = torch.tensor([[e["metrics"][name] for name in (breadth, accuracy)] for e in row.entries])
        error = values.std(0).tolist() if len(values) > 1 else [0.0, 0.0]
        x, y = values.mean(0).tolist()
        marker, color = "os^Dv<>PX*"[number % 10], f"C{number % 10}"
        axes.errorbar(x, y, error[1], error[0], fmt=marker, color=color, capsize=3, label=row.title)
    axes.set(xlabel=breadth, ylabel=accuracy, title="Accuracy against breadth, test split")
    axes.margins(0.15)
    figure.legend(loc="outside lower left", ncols=panels, fontsize="small")  # never over a dot
    for other in beside:
        plot_differences(
            other, {fill(title, 24, break_long_words=False): found for title, found in differences.items()}
        )
        other.set(xlabel="95 % interval over users (filled: without 0)", title=f"{accuracy}: difference to {against}")
    figure.savefig(file, dpi=DPI)
