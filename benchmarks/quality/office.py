"""Recipes times seeds on real data: one table with mean and standard deviation, and intervals over users.

    python benchmarks/quality/office.py --data_dir DIR
    python benchmarks/quality/office.py --data_dir DIR --seeds 42 43 --recipes recipes/gflowgr_office_llama.yaml

Runs that are kept in benchmarks/results/quality/ with the same recipe are not repeated; all runs share their stages in
--output_dir. Any other option goes to all recipes (`--gflownet.learning_rate 1e-3`).
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gflowtrl.metrics import paired_bootstrap
from gflowtrl.pipeline import Recipe, load_recipe, run
from gflowtrl.pipeline.comparison import spread
from gflowtrl.pipeline.plots import titles_of
from gflowtrl.pipeline.run_report import aligned, interval_text


ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "quality"
RECIPES = [
    *("gflowgr_office_llama", "gflowgr_office_llama_broad", "gflowgr_office_llama_vargrad"),
    "distillation_office_llama",
]
COLUMNS = [f"{name}@{k}" for k in (5, 10) for name in ("recall", "ndcg")]
COLUMNS += [f"{name}@10" for name in ("coverage", "entropy", "dgu", "mgu", "long_tail")]


def settings(recipe: dict) -> dict:
    """What a kept run must agree with: the recipe without the places of this machine, without what else was run or
    measured, and without what is not set."""
    left_out = ("output_dir", "data_dir", "stages", "calibration_rows")
    kept = {name: settings(value) if name == "evaluation" else value for name, value in recipe.items()}
    unset = (("start", "sft"), *((name, value) for name in kept for value in (None, {})))
    return {name: value for name, value in kept.items() if name not in left_out and (name, value) not in unset}


def keep(results: dict, recipe: Recipe, file: Path) -> None:
    """Writes the run without paths, and beside it each user's rank of the target (0: not in the list)."""
    ranks = {}
    for method, entry in results["methods"].items():
        folder = Path(entry.pop("folder"))
        entry.pop("model", None)
        reciprocal = load_file(folder / "per_user.safetensors")["mrr@20"]
        ranks[method] = torch.where(reciprocal > 0, (1 / reciprocal).round(), 0).to(torch.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(ranks, file.with_suffix(".safetensors"))
    file.write_text(json.dumps({**results, "recipe": settings(recipe.as_dict())}, indent=2) + "\n", encoding="utf-8")


def kept_run(recipe: str | Path, options: list[str], file: Path) -> dict:
    """The record of a run, which is made where it is not kept in `file` with the same recipe.

    Args:
        recipe: a file, or the name of one in recipes/.
        options: command line of the recipe.
    """
    path = Path(recipe)
    loaded = load_recipe(path if path.suffix else ROOT / "recipes" / f"{recipe}.yaml", options)
    if file.is_file() and settings(json.loads(file.read_text())["recipe"]) == settings(loaded.as_dict()):
        print(f"{file.name} is there.")
    else:
        keep(run(loaded), loaded, file)
    return json.loads(file.read_text())


def gains(ranks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Recall@10 and NDCG@10 of each user from ranks."""
    inside = (ranks > 0) & (ranks <= 10)
    return {"recall@10": inside.double(), "ndcg@10": torch.where(inside, 1 / torch.log2(ranks + 1.0), 0.0).double()}


def rows_of(runs: dict[str, list[Path]]) -> dict[str, list[tuple[dict, dict, dict | None]]]:
    """Title to (record, gains of each user, gains under the same run's control) of every seed.

    What recipes share is taken from the first of them; a control of another number of steps, or one that begins from
    another model, is a row of its own.
    """
    rows, shared = {}, None
    for number, (name, files) in enumerate(runs.items()):
        for file in files:
            record, ranks = json.loads(file.read_text()), load_file(file.with_suffix(".safetensors"))
            titles = titles_of(record["recipe"])
            control = gains(ranks["control"]) if "control" in ranks else None
            for method, entry in record["methods"].items():
                if method == "control" and shared is None:
                    shared = titles[method], entry["steps"]
                own = method == "gflownet" or method == "control" and (titles[method], entry["steps"]) != shared
                title = f"{titles[method]}: {name}" if own else titles[method]
                if own or number == 0:
                    compared = None if method == "control" else control
                    rows.setdefault(title, []).append((entry, gains(ranks[method]), compared))
    return rows


def table(runs: dict[str, list[Path]]) -> str:
    """Markdown: mean ± standard deviation over seeds, and the difference to the control of as many steps with its 95 %
    interval over users, each user's figures averaged over the seeds first."""
    metrics = ("recall@10", "ndcg@10")
    lines = [["method", *COLUMNS, "minutes", *(f"{name} - control" for name in metrics)]]
    for title, seeds in rows_of(runs).items():
        cells = [spread([entry["metrics"][name] for entry, _, _ in seeds]) for name in COLUMNS]
        seconds = [entry["seconds"] for entry, _, _ in seeds if "seconds" in entry]
        cells.append(spread([value / 60 for value in seconds], digits=1) if len(seconds) == len(seeds) else "")
        ours, controls = [gain for _, gain, _ in seeds], [control for _, _, control in seeds]
        cells += ["" if None in controls else difference(ours, controls, name) for name in metrics]
        lines.append([title, *cells])
    return aligned(lines)


def difference(ours: list[dict], theirs: list[dict], metric: str) -> str:
    """Mean with its 95 % interval over users, each user's figures averaged over the seeds first."""
    ours, theirs = (torch.stack([one[metric] for one in runs]).mean(0) for runs in (ours, theirs))
    return interval_text(paired_bootstrap(ours, theirs))


def places(given: argparse.Namespace, seed: int) -> list[str]:
    """The command line of a recipe that says where data and stages are, and the seed."""
    return ["--data_dir", given.data_dir, "--output_dir", given.output_dir, "--seed", str(seed)]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the places that all these scripts need."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the folder of the data")
    parser.add_argument("--output_dir", default="outputs/office_llama", help="where stages are kept")
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipes", nargs="+", default=[str(ROOT / "recipes" / f"{name}.yaml") for name in RECIPES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--prefix", default="office", help="beginning of the names of the kept files")
    given, others = parser.parse_known_args()
    runs: dict[str, list[Path]] = {}
    for seed in given.seeds:
        for path in given.recipes:
            options = [*places(given, seed), *others]
            name = load_recipe(path, options).name
            file = KEPT / f"{given.prefix}-{name}-seed{seed}.json"
            beam = kept_run(path, options, file)["recipe"]["evaluation"]["num_beams"]
            runs.setdefault(name, []).append(file)
    print(f"\n{len(given.seeds)} seed(s), test split, beam {beam}:\n\n{table(runs)}")


if __name__ == "__main__":
    main()
