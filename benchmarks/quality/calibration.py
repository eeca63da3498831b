"""Does the policy follow its reward on real data? Total variation and Jensen-Shannon divergence to R / Z.

    python benchmarks/quality/calibration.py --data_dir DIR --recipes recipes/gflowgr_office_llama.yaml --seeds 42

For every recipe and seed, SFT, SFT continued (the control) and the GFlowNet are compared with the recipe's R / Z over
all items, on some training rows (which the objective fits) and some test rows. On test rows the reward knows the
target and the policy does not, so even a perfect policy keeps a distance of about the target's share of R. Finished
runs are loaded from --output_dir, others are trained. Existing records in benchmarks/results/quality/ are reused.
"""

import json
from dataclasses import replace

from office import KEPT, ROOT, make_parser, places, settings

from gflowtrl.pipeline import Recipe, load_recipe, run
from gflowtrl.pipeline.comparison import spread
from gflowtrl.pipeline.run_report import aligned


METHODS = {"sft": "SFT", "control": "SFT continued", "gflownet": "GFlowNet"}


def measure(recipe: Recipe, count: int) -> dict:
    """Return the record of a run's calibration stage, without the data of its diagrams."""
    wanted = replace(recipe, evaluation=replace(recipe.evaluation, calibration_rows=count))
    found = run(wanted, quiet=True).get("calibration", {"left_out": "the recipe has no rewards."})
    if "left_out" in found:
        raise SystemExit(f"{recipe.name}: {found['left_out']}")
    methods = {
        method: {
            part: {name: value for name, value in values.items() if name != "reliability"}
            for part, values in found["methods"][method].items()
        }
        for method in METHODS
    }
    sizes = {name: found[name] for name in ("rows", "leaves")}
    return {**sizes, "recipe": settings(recipe.as_dict()), "methods": methods}


def table(records: dict[str, list[dict]]) -> str:
    columns = [(part, name) for part in ("training", "test") for name in ("total_variation", "jensen_shannon")]
    lines = [["recipe", "policy", *(f"{name.replace('_', ' ')}, {part}" for part, name in columns)]]
    for name, seeds in records.items():
        for method, title in METHODS.items():
            cells = [spread([r["methods"][method][part][n] for r in seeds], digits=3) for part, n in columns]
            lines.append([name, title, *cells])
    return aligned(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipes", nargs="+", default=[str(ROOT / "recipes" / "gflowgr_office_llama.yaml")])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--rows", type=int, default=64, help="training rows, and as many test rows")
    given = parser.parse_args()
    records: dict[str, list[dict]] = {}
    for path in given.recipes:
        for seed in given.seeds:
            recipe = load_recipe(path, places(given, seed))
            file = KEPT / f"calibration-{recipe.name}-seed{seed}.json"
            kept = json.loads(file.read_text()) if file.is_file() else {}
            if settings(kept.get("recipe", {})) != settings(recipe.as_dict()) or kept.get("rows") != given.rows:
                kept = measure(recipe, given.rows)
                file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
            records.setdefault(recipe.name, []).append(kept)
    print(table(records))


if __name__ == "__main__":
    main()
