"""`gflowtrl evaluate`: ranking and breadth metrics of a saved recommender."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_model_options, guarded, load_models, make_parser, parse, show


if TYPE_CHECKING:
    from gflowtrl.data import InteractionData, Splits
    from gflowtrl.ensemble import Ensemble
    from gflowtrl.recommender import Recommender


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code."""
    parser = make_parser("evaluate", "Evaluate a saved recommender by constrained beam search.")
    add_model_options(parser)
    parser.add_argument("--data_dir", required=True, help="folder of the data (docs/data.md)")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="split of the targets")
    parser.add_argument("--temporal", action="store_true", help="split by time, as recipes with data.split: temporal")
    parser.add_argument("--validation_share", type=float, default=0.1, help="with --temporal: data.validation_share")
    parser.add_argument("--test_share", type=float, default=0.1, help="with --temporal: data.test_share")
    parser.add_argument("--ks", type=int, nargs="+", default=[5, 10, 20], help="cutoffs of the metrics")
    parser.add_argument("--num_beams", type=int, default=20, help="beam width")
    parser.add_argument("--batch_size", type=int, default=256, help="histories decoded together")
    parser.add_argument(
        "--exposed_orders", type=int, default=1, help="orders of a history, averaged for exposed items"
    )
    parser.add_argument("--exposed_correction", type=float, default=0.5, help="c of the corrected ranking of those")
    parser.add_argument("--output", type=Path, help="JSON file for the metrics")
    return guarded(lambda: _evaluate(parse(parser, arguments)))


def _evaluate(options: argparse.Namespace) -> None:
    from gflowtrl.checks import COUNT, NOT_NEGATIVE, check_number
    from gflowtrl.data import leave_one_out, read_interactions, temporal_split
    from gflowtrl.ensemble import Ensemble
    from gflowtrl.metrics.ranking_report import UNSEEN
    from gflowtrl.pipeline.evaluation import earlier_items, measure_saved
    from gflowtrl.pipeline.exposed import exposed_headings, exposed_lines
    from gflowtrl.pipeline.run_report import aligned
    from gflowtrl.pipeline.stage import write_json

    if not options.temporal and (options.validation_share, options.test_share) != (0.1, 0.1):
        raise ValueError("--validation_share and --test_share are used with --temporal only.")
    check_number("--exposed_orders", options.exposed_orders, COUNT)
    check_number("--exposed_correction", options.exposed_correction, NOT_NEGATIVE)
    data = read_interactions(options.data_dir)
    recommender = load_models(options)
    if unknown := [item for item in data.items if item not in recommender.catalog]:
        raise ValueError(
            f"{len(unknown)} of {len(data.items)} items of {options.data_dir} are not in the recommender's catalog; "
            f"the first is {unknown[0]!r}. Give the data that the recommender was trained on."
        )
    if options.temporal:
        longest = recommender.max_history_items
        splits = temporal_split(data, options.validation_share, options.test_share, longest)
    else:
        splits = leave_one_out(data, recommender.max_history_items)
    rows = getattr(splits, options.split)
    counts = dict(zip(data.items, splits.item_counts.tolist(), strict=True))
    earlier, beams, size = earlier_items(data, rows), options.num_beams, options.batch_size
    report = measure_saved(recommender, rows, earlier, counts, options.ks, beams, size)
    content = {"model": options.model[0]}
    if isinstance(recommender, Ensemble):
        views = [str(view) for view in recommender.views]
        content = {"model": options.model, "weights": recommender.weights, "views": views}
    content |= {"split": options.split, "users": len(rows), "num_beams": options.num_beams}
    content |= {"metrics": report.metrics, "standard_errors": report.standard_errors}
    exposed = _exposed(options, data, recommender, splits)
    content |= {"exposed": exposed} if exposed else {}
    if options.output is not None:
        write_json(options.output, content)
    kinds = ("item_recall", "item_ndcg", "recall", "ndcg", "mrr", "coverage", "gini")
    lines = [["metric", "value", "standard error", "seen removed", "standard error"]]
    for name in (name for name in report.metrics if name.split("@")[0] in kinds):
        columns = [(report.metrics[one], report.standard_errors.get(one)) for one in (name, f"{UNSEEN}{name}")]
        cells = [(f"{value:.4f}", "" if error is None else f"{error:.4f}") for value, error in columns]
        lines.append([name, *chain.from_iterable(cells)])
    about = f"{data.summary()}; {options.split} split, {len(rows):,} users, beam width {options.num_beams}"
    text = f"{about}\n\n{aligned(lines)}"
    if exposed:
        cells = ["exposed items", *exposed_lines(exposed["metrics"], exposed["standard_errors"])]
        text += f"\n\n{exposed['rows']}\n\n{aligned([['', *exposed_headings()], cells])}"
    show(options, content, text)


def _exposed(
    options: argparse.Namespace, data: InteractionData, recommender: Recommender | Ensemble, splits: Splits
) -> dict[str, Any]:
    """Measure the recommender on the exposed items of the data; {} without such items."""
    import torch

    from gflowtrl.data import exposed_rows
    from gflowtrl.pipeline.exposed import exposure_penalty, rank_exposed, report_exposed, system_scorer

    if data.exposed is None:
        return {}
    found, catalog = exposed_rows(data.users, data.sequences, data.exposed), recommender.catalog
    by_item = dict(zip(data.items, splits.exposure_counts.tolist(), strict=True))
    penalty = exposure_penalty(
        torch.tensor([by_item.get(item, 0) for item in catalog.items]), options.exposed_correction
    )
    score, size = system_scorer(recommender), options.batch_size
    scores = rank_exposed(score, found.rows, catalog, options.exposed_orders, size)
    report = report_exposed(scores, found.rows, catalog, penalty)
    return {"rows": str(found), "metrics": report.metrics, "standard_errors": report.standard_errors}
