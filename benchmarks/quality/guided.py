"""Beam search guided by the flow head, against plain beam search, for models that learn log F.

    OMP_NUM_THREADS=1 python benchmarks/quality/guided.py --data_dir DIR --models MODEL ... --split validation

MODEL is the folder `model` of a stage that was trained by detailed or sub-trajectory balance, with its
flow_heads.safetensors. Differences to plain search (weight 0) have 95 % intervals over users.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from gflowtrl import Recommender
from gflowtrl.data import leave_one_out, read_interactions
from gflowtrl.metrics import leaf_ranking_metrics, paired_bootstrap
from gflowtrl.pipeline.run_report import aligned, interval_text
from gflowtrl.policy import attach_flow_heads, make_policy
from gflowtrl.policy.heads import load_heads


METRICS = ("item_recall@10", "item_ndcg@10")
BATCH = 256


def with_heads(folder: str) -> Recommender:
    """Load a recommender together with its flow head."""
    model = Recommender.from_pretrained(folder)
    attach_flow_heads(model.model)
    load_heads(model.model, load_file(Path(folder, "flow_heads.safetensors")))
    return model


def measure(model: Recommender, rows: Dataset, num_beams: int, weight: float) -> dict[str, Tensor]:
    """Return the metrics of each row with the given weight of the flows."""
    policy, catalog, found = make_policy(model.model, model.catalog), model.catalog, []
    for start in tqdm(range(0, len(rows), BATCH), desc=f"{num_beams} beams, weight {weight}", leave=False):
        prompts = model.encoder(rows[start : start + BATCH]["history"])
        found.append(policy.beam_search(prompts, num_beams, flow_weight=weight)[0])
    leaves = torch.cat(found)
    return leaf_ranking_metrics(leaves, catalog.leaf_of(rows["target"]).cpu(), catalog.leaf_sizes.cpu(), [10])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the folder of the data")
    parser.add_argument("--models", required=True, nargs="+", help="folders of recommenders with flow heads")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--weights", nargs="+", type=float, default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--num_beams", nargs="+", type=int, default=[10, 20])
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    results, lines = [], [["model", "beams", "weight", *METRICS, *(f"{name} - plain" for name in METRICS)]]
    for number, folder in enumerate(given.models, 1):
        model = with_heads(folder)
        splits = leave_one_out(read_interactions(given.data_dir), model.max_history_items)
        rows = getattr(splits, given.split)
        for beams in given.num_beams:
            plain = measure(model, rows, beams, 0.0)
            for weight in (0.0, *given.weights):
                gains = plain if weight == 0 else measure(model, rows, beams, weight)
                differences = {name: paired_bootstrap(gains[name], plain[name]) for name in METRICS}
                means = {name: float(gains[name].mean()) for name in METRICS}
                results.append(
                    {"model": number, "beams": beams, "weight": weight, **means, "minus_plain": differences}
                )
                cells = [str(number), str(beams), str(weight), *(f"{means[name]:.4f}" for name in METRICS)]
                lines.append([*cells, *(interval_text(differences[name]) if weight else "" for name in METRICS)])
    print(f"\n{aligned(lines)}")
    if given.out is not None:
        report = {"split": given.split, "users": len(rows), "results": results}
        given.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
