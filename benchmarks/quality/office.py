"""Several recipes and seeds on real data: a table with means, standard deviations, and intervals over users.

    python benchmarks/quality/office.py --data_dir DIR
    python benchmarks/quality/office.py --data_dir DIR --seeds 42 43 --recipes recipes/gflowgr_office_llama.yaml

Runs with a record of the same recipe in benchmarks/results/quality/ are not repeated. All runs share their stages in
--output_dir. All other options are passed to every recipe (`--gflownet.learning_rate 1e-3`).
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gflowtrl.metrics import paired_bootstrap
from gflowtrl.metrics.ranking_report import UNSEEN
from gflowtrl.pipeline import Recipe, load_recipe, run
from gflowtrl.pipeline.comparison import spread
from gflowtrl.pipeline.plots import main_metrics, metric_title, titles_of
from gflowtrl.pipeline.run_report import aligned, interval_text
from gflowtrl.pipeline.sections import DataSection, EvaluationSection


ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "quality"
RECIPES = [
    *("gflowgr_office_llama", "gflowgr_office_llama_broad", "gflowgr_office_llama_vargrad"),
    "distillation_office_llama",
]
COLUMNS = [*main_metrics(5)[:2], *main_metrics(10)]
COLUMNS += [f"{name}@10" for name in ("coverage", "entropy", "dgu", "mgu", "long_tail")]
HEADINGS = [metric_title(name) for name in COLUMNS]
SECTIONS = {"data": DataSection, "evaluation": EvaluationSection}
UNSEEN_RANKS = ", seen removed"  # after a method's name in the ranks of a record


def settings(recipe: dict) -> dict:
    """Return the part of a recipe that must equal that of a kept record.

    Paths, the choice of stages, the number of calibration rows and fields that are not set do not count. Fields that a
    record lacks have their defaults.
    """
    left_out = ("output_dir", "data_dir", "stages", "calibration_rows")
    kept = dict(recipe)
    for name in SECTIONS.keys() & recipe.keys():
        kept[name] = settings({**asdict(SECTIONS[name]()), **recipe[name]})
    unset = (("start", "sft"), *((name, value) for name in kept for value in (None, {})))
    return {name: value for name, value in kept.items() if name not in left_out and (name, value) not in unset}


def keep(results: dict, recipe: Recipe, file: Path) -> None:
    """Write the record of a run without paths, and next to it the rank of the target's semantic id for each user, also
    with seen items removed (0: not in the list), and the metrics of each user's exposed items."""
    ranks = {}
    for method, entry in results["methods"].items():
        folder = Path(entry.pop("folder"))
        entry.pop("model", None)
        users = load_file(folder / "per_user.safetensors")
        for name, metric in ((method, "mrr@20"), (f"{method}{UNSEEN_RANKS}", f"{UNSEEN}mrr@20")):
            ranks[name] = torch.where(users[metric] > 0, (1 / users[metric]).round(), 0).to(torch.uint8)
    exposed = {}
    for method, entry in results.get("exposed", {}).get("methods", {}).items():
        users = load_file(Path(entry.pop("folder")) / "per_user.safetensors")
        exposed |= {f"{method}/{name}": values.float() for name, values in users.items() if name != "row_id"}
    file.parent.mkdir(parents=True, exist_ok=True)
    if exposed:
        save_file(exposed, exposed_file(file))
    save_file(ranks, file.with_suffix(".safetensors"))
    file.write_text(json.dumps({**results, "recipe": settings(recipe.as_dict())}, indent=2) + "\n", encoding="utf-8")


def exposed_file(file: Path) -> Path:
    """The file with the exposed items' metrics of each user, next to a record."""
    return file.with_name(f"{file.stem}-exposed.safetensors")


def kept_run(recipe: str | Path, options: list[str], file: Path) -> dict:
    """Return the record of a run; run the recipe first unless `file` has a record of the same recipe.

    Args:
        recipe: a file, or the name of one in recipes/.
        options: command-line options of the recipe.
        file: the record.
    """
    path = Path(recipe)
    loaded = load_recipe(path if path.suffix else ROOT / "recipes" / f"{recipe}.yaml", options)
    if file.is_file() and settings(json.loads(file.read_text())["recipe"]) == settings(loaded.as_dict()):
        print(f"{file.name} exists; its run is not repeated.")
    else:
        keep(run(loaded), loaded, file)
    return json.loads(file.read_text())


def gains(ranks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return Recall@10 and NDCG@10 of each user, computed from ranks."""
    inside = (ranks > 0) & (ranks <= 10)
    return {"recall@10": inside.double(), "ndcg@10": torch.where(inside, 1 / torch.log2(ranks + 1.0), 0.0).double()}


def figures(records: list[dict]) -> list[str]:
    """Return the figures of the columns, from the metrics of one record per seed; "" for those that a record lacks."""
    values = [[metrics.get(name) for metrics in records] for name in COLUMNS]
    return ["" if None in found else spread(found) for found in values]


def rows_of(runs: dict[str, list[Path]]) -> dict[str, list[tuple[dict, dict, dict | None]]]:
    """Map each title to one (record, gains of each user, gains of the same run's control) per seed.

    Methods that the recipes share are taken from the first recipe. A control with another number of steps, or with
    another initial model, gets a separate row.
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
    """Return a Markdown table: mean ± standard deviation over seeds, and the difference to the run's control.

    Differences count semantic ids, which the records hold for each user. They have a 95 % interval over users, whose
    figures are averaged over the seeds first.
    """
    metrics = ("recall@10", "ndcg@10")
    lines = [["method", *HEADINGS, "minutes", *(f"{name} - control" for name in metrics)]]
    for title, seeds in rows_of(runs).items():
        cells = figures([entry["metrics"] for entry, _, _ in seeds])
        seconds = [entry["seconds"] for entry, _, _ in seeds if "seconds" in entry]
        cells.append(spread([value / 60 for value in seconds], digits=1) if len(seconds) == len(seeds) else "")
        ours, controls = [gain for _, gain, _ in seeds], [control for _, _, control in seeds]
        cells += ["" if None in controls else difference(ours, controls, name) for name in metrics]
        lines.append([title, *cells])
    return aligned(lines)


def difference(ours: list[dict], theirs: list[dict], metric: str) -> str:
    """Return the mean difference and its 95 % interval over users, averaged over the seeds first."""
    ours, theirs = (torch.stack([one[metric] for one in runs]).mean(0) for runs in (ours, theirs))
    return interval_text(paired_bootstrap(ours, theirs))


def places(given: argparse.Namespace, seed: int) -> list[str]:
    """Return the recipe options for the data folder, the folder of the stages, and the seed."""
    return ["--data_dir", given.data_dir, "--output_dir", given.output_dir, "--seed", str(seed)]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the folders that all scripts of this directory need."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the folder of the data")
    parser.add_argument("--output_dir", default="outputs/office_llama", help="folder of the stages")
    return parser


def kept_runs(
    parser: argparse.ArgumentParser, recipes: Sequence[Path], prefix: str
) -> tuple[argparse.Namespace, dict[str, list[Path]]]:
    """Run every recipe with every seed of the command line, and return its options and the records by recipe.

    Args:
        parser: from `make_parser`.
        recipes: default of --recipes.
        prefix: default of --prefix.
    """
    parser.add_argument("--recipes", nargs="+", type=Path, default=recipes)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--prefix", default=prefix, help="beginning of the names of the kept files")
    given, others = parser.parse_known_args()
    runs: dict[str, list[Path]] = {}
    for seed in given.seeds:
        for path in given.recipes:
            options = [*places(given, seed), *others]
            name = load_recipe(path, options).name
            file = KEPT / f"{given.prefix}-{name}-seed{seed}.json"
            kept_run(path, options, file)
            runs.setdefault(name, []).append(file)
    return given, runs


def main() -> None:
    recipes = [ROOT / "recipes" / f"{name}.yaml" for name in RECIPES]
    given, runs = kept_runs(make_parser(__doc__), recipes, "office")
    last = json.loads([*runs.values()][-1][-1].read_text())
    beam = last["recipe"]["evaluation"]["num_beams"]
    print(f"\n{len(given.seeds)} seed(s), test split, beam {beam}:\n\n{table(runs)}")


if __name__ == "__main__":
    main()
