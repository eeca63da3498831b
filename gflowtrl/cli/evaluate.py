"""`gflowtrl evaluate`: ranking and breadth metrics of a saved recommender."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .common import guarded, make_parser, parse, print_json


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = make_parser("evaluate", "Measures a saved recommender by constrained beam search.")
    parser.add_argument("--model", help="folder of the recommender (the `model` of a training stage), or its Hub name")
    parser.add_argument("--data_dir", help="folder of the data (docs/data.md)")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="which targets")
    parser.add_argument("--ks", type=int, nargs="+", default=[5, 10, 20], help="cut-offs of the metrics")
    parser.add_argument("--num_beams", type=int, default=20, help="width of the beam search")
    parser.add_argument("--batch_size", type=int, default=256, help="histories decoded together")
    parser.add_argument("--output", type=Path, help="JSON file for the metrics")
    return guarded(lambda: _evaluate(parse(parser, arguments)))


def _evaluate(given: argparse.Namespace) -> None:
    for name in ("model", "data_dir"):
        if getattr(given, name) is None:
            raise ValueError(f"--{name} is missing.")
    from gflowtrl.data import leave_one_out, read_interactions
    from gflowtrl.metrics import summarise
    from gflowtrl.pipeline.report import aligned
    from gflowtrl.pipeline.stage import write_json
    from gflowtrl.recommender import Recommender
    from gflowtrl.trainer import rank_rows

    data = read_interactions(given.data_dir)
    recommender = Recommender.from_pretrained(given.model)
    strangers = [item for item in data.items if item not in recommender.catalog]
    if strangers:
        raise ValueError(
            f"{len(strangers)} of {len(data.items)} items of {given.data_dir} are not in the recommender's catalogue, "
            f"the first is {strangers[0]!r}. Give the data that it was trained on."
        )
    splits = leave_one_out(data, recommender.encoder.max_history_items)
    rows = getattr(splits, given.split)
    leaves = rank_rows(recommender.policy, recommender.encoder, rows, given.num_beams, given.batch_size, progress=True)
    catalog = recommender.catalog.to("cpu")
    counts = splits.item_counts if catalog.items == data.items else _in_order(splits.item_counts, data.items, catalog)
    report = summarise(leaves.cpu(), catalog.leaf_of(rows["target"]), catalog, counts, given.ks)
    found = {"model": str(given.model), "split": given.split, "users": len(rows), "num_beams": given.num_beams}
    found |= {"metrics": report.metrics, "standard_errors": report.standard_errors}
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.output, found)
    if given.json:
        print_json(found)
        return
    shown = [name for name in report.metrics if name.split("@")[0] in ("recall", "ndcg", "mrr", "coverage", "gini")]
    rows_shown = [[n, f"{report.metrics[n]:.4f}", _spread(report.standard_errors.get(n))] for n in shown]
    print(f"{data.summary()}; {given.split} split, {len(rows):,} users, beam {given.num_beams}\n")
    print(aligned([["metric", "value", "standard error"], *rows_shown]))


def _in_order(counts, items, catalog):
    """Counts of the data's items in the order of the catalogue, 0 for those that the data has not."""
    by_item = dict(zip(items, counts.tolist(), strict=True))
    return counts.new_tensor([by_item.get(item, 0) for item in catalog.items])


def _spread(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
