"""Does the policy follow its reward on real data? Total variation and Jensen-Shannon divergence to R / Z.

    python benchmarks/quality/calibration.py --data_dir DIR --recipes recipes/gflowgr_office_llama.yaml --seeds 42

For every recipe and seed: SFT, its continuation (the control) and the GFlowNet, each against the recipe's own R / Z,
over all items, on some training rows (what the objective asks for) and some test rows, whose targets the reward knows
and the policy does not: there even a perfect policy stays about the target's share of R away. Runs are loaded from
--output_dir, or made where they are not finished. Records kept in benchmarks/results/quality/ are not made again.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from office import KEPT, ROOT, settings, spread

from gflowtrl.pipeline import Recipe, load_recipe, run
from gflowtrl.pipeline.job import needs_teacher
from gflowtrl.pipeline.materials import Materials, prepare
from gflowtrl.pipeline.signals import build_rewards, final_weights, fit_teacher
from gflowtrl.pipeline.stage import Workshop
from gflowtrl.policy import load_backbone, make_policy
from gflowtrl.rewards import RewardFusion
from gflowtrl.trainer import compare_with_rewards
from gflowtrl.trainer.gflownet_trainer import fuse_rewards


METHODS = {"sft": "SFT", "control": "SFT continued", "gflownet": "GFlowNet"}


def fusion_of(materials: Materials, sft_model: str) -> RewardFusion:
    """The recipe's R, as its GFlowNet stage was trained with."""
    recipe = materials.recipe
    workshop = Workshop(recipe.output_dir, quiet=True)
    teacher = fit_teacher(workshop, materials, recipe.teacher) if needs_teacher(recipe) else None
    args = recipe.training_arguments("gflownet", Path(recipe.output_dir) / "unused")
    rewards = build_rewards(workshop, materials, teacher, Path(sft_model))
    args.reward_weights = final_weights(workshop, materials, rewards)
    return fuse_rewards(rewards, args, materials.catalog, materials.tokenizer)


def some(rows: Dataset, count: int) -> Dataset:
    """Rows spread evenly over all."""
    return rows.select([i * len(rows) // count for i in range(min(count, len(rows)))])


def measure(recipe: Recipe, count: int) -> dict:
    materials = prepare(recipe)
    methods = run(recipe, materials, quiet=True)["methods"]
    rewards = fusion_of(materials, methods["sft"]["model"])
    parts = {"training": some(materials.splits.train, count), "test": some(materials.splits.test, count)}
    record = {
        "rows": count,
        "leaves": materials.catalog.tree.num_leaves,
        "recipe": settings(recipe.as_dict()),
        "methods": {},
    }
    for method in METHODS:
        policy = make_policy(load_backbone(methods[method]["model"]).eval(), materials.catalog)
        record["methods"][method] = {
            part: {name: float(values.mean()) for name, values in compare_with_rewards(
                policy, rewards, materials.encoder, rows).items()}
            for part, rows in parts.items()
        }  # fmt: skip
    return record


def table(records: dict[str, list[dict]]) -> str:
    columns = [(part, name) for part in ("training", "test") for name in ("total_variation", "jensen_shannon")]
    lines = ["| recipe | policy | " + " | ".join(f"{n.replace('_', ' ')}, {part}" for part, n in columns) + " |"]
    lines.append("|---|---" + "|---:" * len(columns) + "|")
    for name, seeds in records.items():
        for method, title in METHODS.items():
            cells = [spread([r["methods"][method][part][n] for r in seeds], digits=3) for part, n in columns]
            lines.append(f"| {name} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the folder of the data")
    parser.add_argument("--recipes", nargs="+", default=[str(ROOT / "recipes" / "gflowgr_office_llama.yaml")])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--output_dir", default="outputs/office_llama", help="where stages are kept")
    parser.add_argument("--rows", type=int, default=64, help="rows of either part")
    given = parser.parse_args()
    records: dict[str, list[dict]] = {}
    for path in given.recipes:
        for seed in given.seeds:
            places = ["--data_dir", given.data_dir, "--output_dir", given.output_dir, "--seed", str(seed)]
            recipe = load_recipe(path, places)
            file = KEPT / f"calibration-{recipe.name}-seed{seed}.json"
            kept = json.loads(file.read_text()) if file.is_file() else {}
            if settings(kept.get("recipe", {})) != settings(recipe.as_dict()) or kept.get("rows") != given.rows:
                kept = measure(recipe, given.rows)
                file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
            records.setdefault(recipe.name, []).append(kept)
    print(table(records))


if __name__ == "__main__":
    main()
