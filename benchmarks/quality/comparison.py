"""The baselines and the library's methods from one SFT checkpoint per seed, with equal steps, in one table.

    OMP_NUM_THREADS=1 python benchmarks/speed/methods.py --data_dir DIR --recipes FILES --out FILE  # costs
    OMP_NUM_THREADS=1 python benchmarks/quality/comparison.py --data_dir DIR --costs FILE

Runs are trained and recorded as in office.py. For each model, the survival of prefixes in beam search is measured on
the exact distribution of some test users (`gflowtrl.metrics.prefix_metrics`) and recorded, too. Differences are
relative to cross entropy over the vocabulary, continued for as many steps.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from audit import prefixes
from office import KEPT, ROOT, difference, gains, kept_run, make_parser, places
from safetensors.torch import load_file

from gflowtrl.pipeline import load_recipe, run
from gflowtrl.pipeline.comparison import spread
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.pipeline.run_report import aligned


OWN = ROOT / "benchmarks" / "quality" / "recipes"
BASELINE = "cross_entropy"
#: Maps recipes to titles. The stages that all recipes share are taken from the first one.
RECIPES = {
    OWN / "cross_entropy.yaml": "cross entropy",
    OWN / "msl_temperature.yaml": "MSL, temperature .7",
    OWN / "sdpo.yaml": "S-DPO",
    OWN / "grpo.yaml": "GRPO (ReRe)",
    OWN / "apao_pointwise.yaml": "APAO, pointwise",
    OWN / "apao_pairwise.yaml": "APAO, pairwise",
    ROOT / "recipes" / "gflowgr_paper.yaml": "GFlowGR (paper)",
    ROOT / "recipes" / "gflowgr_office_llama.yaml": "GFlowNet, exact flows",
    OWN / "exact_prefix.yaml": "exact flows + prefix loss",
}
SHARED = {
    "teacher": "teacher (SASRec)",
    "sft": "SFT, the checkpoint",
    "control": "cross entropy over the tree (MSL, temperature 1)",
}
COLUMNS = [f"{name}@{k}" for k in (5, 10, 20) for name in ("recall", "ndcg")]
COLUMNS += ["coverage@10", "dgu@10", "mgu@10"]
SURVIVAL = {
    "survival@1": "target's prefix in the beam: 1 token",
    "survival@2": "2 tokens",
    "top_survival": "top 20 found",
}


def prefix_file(record: Path) -> Path:
    """Return the file of a run's prefix metrics, next to its record."""
    return record.with_name(f"{record.stem}-prefixes.json")


def kept_prefixes(path: Path, options: list[str], file: Path, users: int, shared: bool) -> dict[str, dict]:
    """Return the prefix metrics of the run whose record is `file`; measure those that are not recorded yet."""
    kept = prefix_file(file)
    content = json.loads(kept.read_text()) if kept.is_file() else {"users": users, "methods": {}}
    if content["users"] != users:
        content = {"users": users, "methods": {}}
    wanted = ["gflownet", *(["sft", "control"] if shared else [])]
    missing = [method for method in wanted if method not in content["methods"]]
    if missing:
        recipe = load_recipe(path, options)
        run_data = prepare(recipe)
        methods = run(recipe, run_data, quiet=True)["methods"]
        for method in missing:
            title = f"{file.stem}, {method}"
            content["methods"][method] = prefixes(
                methods[method]["model"], run_data, users, recipe.evaluation.num_beams, title
            )
        kept.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content["methods"]


def lines(runs: dict[str, dict[int, tuple[Path, dict]]], costs: dict[str, dict]) -> Iterator[list[str]]:
    """Yield the rows of the table. `runs` maps each recipe and seed to its record's file and its prefix metrics."""
    titles = {path.stem: title for path, title in RECIPES.items()}
    everywhere = max(len(by_seed) for by_seed in runs.values())
    for number, (name, by_seed) in enumerate(runs.items()):
        seeds = list(by_seed.values())
        baseline = [
            gains(load_file(runs[BASELINE][seed][0].with_suffix(".safetensors"))["gflownet"]) for seed in by_seed
        ]
        measured = [json.loads(file.read_text())["methods"] for file, _ in seeds]
        for method in [*(SHARED if number == 0 else []), "gflownet"]:
            if any(method not in methods for methods in measured):
                continue  # excluded by `--stages`
            records = [methods[method] for methods in measured]
            cells = [spread([record["metrics"][column] for record in records]) for column in COLUMNS]
            survived = [found[method] for _, found in seeds if method in found]
            for column in SURVIVAL:
                cells.append(spread([one[column] for one in survived], digits=3) if survived else "")
            cost = costs.get(name if method == "gflownet" else "")
            cells += (
                ["", ""] if cost is None else [f"{cost['seconds_an_epoch']:.0f}", f"{cost['peak_memory'] / 1e6:.0f}"]
            )
            ours = [gains(load_file(file.with_suffix(".safetensors"))[method]) for file, _ in seeds]
            itself = (name, method) == (BASELINE, "gflownet")
            cells += ["" if itself else difference(ours, baseline, metric) for metric in ("recall@10", "ndcg@10")]
            title = SHARED.get(method) or titles.get(name, name)
            if len(seeds) < everywhere:
                title += f" (seed {', '.join(map(str, by_seed))})"
            yield [title, *cells]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipes", nargs="+", type=Path, default=list(RECIPES), help="must include cross_entropy")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--prefix", default="office", help="beginning of the names of the kept files")
    parser.add_argument("--kept_only", action="store_true", help="train nothing, skip runs without a record")
    parser.add_argument("--prefix_seeds", nargs="*", type=int, help="seeds whose prefixes are measured (default: all)")
    parser.add_argument("--users", type=int, default=1000, help="test users of the prefix metrics")
    parser.add_argument("--costs", type=Path, help="JSON file of speed/methods.py, for two columns of the table")
    given, others = parser.parse_known_args()
    costs = {row["method"]: row for row in json.loads(given.costs.read_text())["rows"]} if given.costs else {}
    measured = given.seeds if given.prefix_seeds is None else given.prefix_seeds
    runs: dict[str, dict[int, tuple[Path, dict]]] = {}
    for seed in given.seeds:
        for number, path in enumerate(given.recipes):
            where = places(given, seed)
            name = load_recipe(path, [*where, *others]).name
            file = KEPT / f"{given.prefix}-{name}-seed{seed}.json"
            # Shared stages are run and measured with the first recipe only.
            options = [*where, *others] if number == 0 else [*where, "--stages", "sft", "gflownet", *others]
            if given.kept_only:
                if not file.is_file():
                    continue
                found = json.loads(prefix_file(file).read_text())["methods"] if prefix_file(file).is_file() else {}
            else:
                kept_run(path, options, file)
                wanted = seed in measured
                found = kept_prefixes(path, options, file, given.users, shared=number == 0) if wanted else {}
            runs.setdefault(name, {})[seed] = (file, found)
    headings = ["method", *COLUMNS, *SURVIVAL.values(), "s per epoch", "peak MB"]
    headings += [f"{metric} - cross entropy" for metric in ("recall@10", "ndcg@10")]
    print(f"\n{len(given.seeds)} seed(s), test split; prefixes of {given.users} users, seeds {measured}:\n")
    print(aligned([headings, *lines(runs, costs)]))


if __name__ == "__main__":
    main()
