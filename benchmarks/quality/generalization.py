"""Rare targets, and histories with random items: the GFlowNet against the control.

    python benchmarks/quality/generalization.py --data_dir DIR
    python benchmarks/quality/generalization.py --data_dir DIR --recipe recipes/gflowgr_office_llama_vargrad.yaml

Evaluates the models of a run, which is loaded from --output_dir if it is finished and trained otherwise. The rows are:
all users, users whose target occurs in no training history, 1 to 4 times, or more often, and all users with 10 % and
30 % of the items of their histories replaced by random ones, the same for every method. The data has no dates, so
"never" means never in the training part, not new in the last month.
"""

import json
from pathlib import Path

import torch
from datasets import Dataset
from office import KEPT, ROOT, make_parser, places

from gflowtrl.metrics import leaf_ranking_metrics, paired_bootstrap
from gflowtrl.pipeline import load_recipe, run
from gflowtrl.pipeline.run_data import RunData, prepare
from gflowtrl.pipeline.run_report import aligned, interval_text
from gflowtrl.policy import StatelessNoise, load_backbone, make_policy
from gflowtrl.trainer import rank_rows


METHODS = ("sft", "control", "gflownet")
METRICS = ("recall@10", "ndcg@10")
SHARES = (0.0, 0.1, 0.3)


def noisy(rows: Dataset, items: list, share: float, seed: int = 0) -> Dataset:
    """Replace each item of a history by a random one with probability `share`, independently of other rows."""
    if not share:
        return rows
    noise = StatelessNoise(seed).at(0, torch.tensor(rows["row_id"]))
    longest = max(map(len, rows["history"]))
    swap = noise.uniform("swap", longest) < share
    other = (noise.uniform("other", longest) * len(items)).long()
    histories = [
        [items[other[row, place]] if swap[row, place] else item for place, item in enumerate(history)]
        for row, history in enumerate(rows["history"])
    ]
    return rows.remove_columns("history").add_column("history", histories)


def per_user(run_data: RunData, folder: str, rows: Dataset) -> dict[str, torch.Tensor]:
    model = load_backbone(folder).eval()
    policy = make_policy(model, run_data.catalog)
    leaves = rank_rows(policy, run_data.encoder, rows, run_data.recipe.evaluation.num_beams, progress=False)
    targets = run_data.catalog.leaf_of(rows["target"])
    return leaf_ranking_metrics(leaves, targets, run_data.catalog.leaf_sizes, run_data.recipe.evaluation.ks)


def conditions(run_data: RunData, models: dict[str, str]) -> list[dict]:
    """Return one record per condition: means of each method, and GFlowNet minus control with its interval."""
    rows = run_data.splits.test
    count = run_data.item_counts[run_data.catalog.index_of(rows["target"])]
    groups = {"target never in training": count == 0, "1 to 4 times": (count > 0) & (count < 5)}
    groups["5 times and more"] = count >= 5
    records = []
    for share in SHARES:
        changed = noisy(rows, list(run_data.catalog.items), share)
        figures = {method: per_user(run_data, folder, changed) for method, folder in models.items()}
        everyone = torch.ones(len(rows), dtype=torch.bool)
        chosen = {"all users": everyone, **groups} if not share else {f"{share:.0%} of the history random": everyone}
        for name, mask in chosen.items():
            record = {"condition": name, "users": int(mask.sum())}
            for metric in METRICS if mask.any() else ():
                ours = {method: figures[method][metric][mask] for method in models}
                record[metric] = {method: float(values.double().mean()) for method, values in ours.items()}
                record[metric]["gflownet - control"] = paired_bootstrap(ours["gflownet"], ours["control"])
            records.append(record)
    return records


def table(records: list[dict]) -> str:
    lines = [["condition", "users", *(f"{what} {metric}" for metric in METRICS for what in (*METHODS, "difference"))]]
    for record in records:
        cells = []
        for metric in METRICS:
            values = record.get(metric)
            if values is None:
                cells += [""] * (len(METHODS) + 1)
            else:
                means = [f"{values[method]:.4f}" for method in METHODS]
                cells += [*means, interval_text(values["gflownet - control"])]
        lines.append([record["condition"], str(record["users"]), *cells])
    return aligned(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "gflowgr_office_llama.yaml")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, places(given, given.seed))
    run_data = prepare(recipe)
    results = run(recipe, run_data, quiet=True)
    records = conditions(run_data, {method: results["methods"][method]["model"] for method in METHODS})
    print(table(records))
    file = KEPT / f"generalization-{recipe.name}-seed{given.seed}.json"
    file.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
