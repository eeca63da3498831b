"""`gflowtrl compare`: a table and a plot of several runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .common import guarded, make_parser, parse, show


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code."""
    parser = make_parser("compare", "Compare runs in one table: means over seeds and paired differences over users.")
    parser.add_argument("runs", nargs="+", help="output folders of recipes, or results.json files")
    parser.add_argument("--k", type=int, default=10, help="cutoff of the metrics")
    parser.add_argument("--against", help="row to compare with, by the start of its title (default: the control)")
    parser.add_argument("--plot", type=Path, help="PNG file for a plot of accuracy against breadth and of differences")
    return guarded(lambda: _compare(parse(parser, arguments)))


def _compare(options: argparse.Namespace) -> None:
    from gflowtrl.pipeline.comparison import compared_rows, difference, find_results, plot_comparison
    from gflowtrl.pipeline.plots import TITLES, UNTRAINED_CONTROL, main_metrics, metric_title
    from gflowtrl.pipeline.run_report import aligned, interval_text

    rows = compared_rows(find_results(options.runs))
    main, others = main_metrics(options.k), [f"{name}@{options.k}" for name in ("coverage", "gini", "dgu", "mgu")]
    if main[0] not in rows[0].metrics:
        raise ValueError(f"The runs have no {main[0]}; choose --k from their evaluation.ks.")
    prefixes = (TITLES["control"], UNTRAINED_CONTROL) if options.against is None else options.against
    reference = next((row for row in rows if row.title.startswith(prefixes)), None)
    if reference is None and options.against is not None:
        titles = ", ".join(row.title for row in rows)
        raise ValueError(f"--against is {options.against!r}; it must be the start of a row's title: {titles}.")
    compared = main if reference else []
    differences = [{metric: difference(row, reference, metric) for metric in compared} for row in rows]
    if options.plot is not None:
        plotted = {row.title: d[main[1]] for row, d in zip(rows, differences, strict=True) if d.get(main[1])}
        plot_comparison(rows, main[1], others[0], options.plot, plotted, reference.title if reference else "")
    content, lines = [], []
    for row, by_metric in zip(rows, differences, strict=True):
        content.append(
            {"title": row.title, "seeds": list(row.entries), "metrics": row.metrics, "differences": by_metric}
        )
        intervals = [interval_text(by_metric[name]) if by_metric[name] else "" for name in compared[:2]]
        lines.append([row.title, str(len(row.entries)), *map(row.spread, main + others), *intervals])
    headings = [f"{metric_title(name)} - {reference.title}" for name in compared[:2]] if reference else []
    columns = ["method", "seeds", *map(metric_title, main + others), *headings]
    show(options, content, aligned([columns, *lines]))
