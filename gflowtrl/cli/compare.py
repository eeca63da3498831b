"""`gflowtrl compare`: one table and a picture of several runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .common import guarded, make_parser, parse, show


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = make_parser("compare", "Puts runs into one table: means over seeds, differences over users.")
    parser.add_argument("runs", nargs="+", help="output folders of recipes, or results.json files")
    parser.add_argument("--k", type=int, default=10, help="cut-off of the metrics")
    parser.add_argument("--against", help="the row to compare with: how its title begins (default: the control)")
    parser.add_argument("--plot", type=Path, help="PNG file for accuracy against breadth, and the differences")
    return guarded(lambda: _compare(parse(parser, arguments)))


def _compare(given: argparse.Namespace) -> None:
    from gflowtrl.pipeline.comparison import compared_rows, difference, find_results, plot_comparison
    from gflowtrl.pipeline.plots import TITLES, UNTRAINED_CONTROL
    from gflowtrl.pipeline.run_report import aligned, interval_text

    rows = compared_rows(find_results(given.runs))
    metrics = [f"{name}@{given.k}" for name in ("recall", "ndcg", "coverage", "gini", "dgu", "mgu")]
    measured = next(iter(rows[0].entries.values()))["metrics"]
    if metrics[0] not in measured:
        raise ValueError(f"The runs have no {metrics[0]}; choose --k among their evaluation.ks.")
    beginnings = (TITLES["control"], UNTRAINED_CONTROL) if given.against is None else given.against
    other = next((row for row in rows if row.title.startswith(beginnings)), None)
    if other is None and given.against is not None:
        raise ValueError(f"--against {given.against!r} begins no row's title: {', '.join(row.title for row in rows)}.")
    differences = [{m: difference(row, other, m) for m in metrics[:2]} if other else {} for row in rows]
    if given.plot is not None:
        shown = {row.title: d[metrics[1]] for row, d in zip(rows, differences, strict=True) if d.get(metrics[1])}
        plot_comparison(rows, metrics[1], metrics[2], given.plot, shown, other.title if other else "")
    content, lines = [], []
    for row, found in zip(rows, differences, strict=True):
        means = {metric: row.mean(metric) for metric in measured}
        content.append({"title": row.title, "seeds": list(row.entries), "metrics": means, "differences": found})
        intervals = [interval_text(one) if one else "" for one in found.values()]
        lines.append([row.title, str(len(row.entries)), *map(row.spread, metrics), *intervals])
    columns = ["method", "seeds", *metrics, *(f"{m} - {other.title}" for m in metrics[:2] if other)]
    show(given, content, aligned([columns, *lines]))
