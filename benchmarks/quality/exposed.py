"""Exposed items: the ranking of what users were shown at random, of several methods and seeds, in one table.

    python benchmarks/quality/exposed.py --data_dir DIR
    python benchmarks/quality/exposed.py --data_dir DIR --prefix coat --output_dir outputs/coat
    python benchmarks/quality/exposed.py --data_dir DIR --plot docs/images/truth.png

Runs with a record of the same recipe in benchmarks/results/quality/ are not repeated. All runs share their stages in
--output_dir. All other options are passed to every recipe.
"""

import json
from pathlib import Path
from statistics import fmean

import matplotlib
import torch
from matplotlib import pyplot as plt
from office import ROOT, exposed_file, kept_runs, make_parser
from safetensors.torch import load_file

from gflowtrl.pipeline.comparison import spread
from gflowtrl.pipeline.exposed import EXPOSED_NAMES, exposed_headings, paired_difference
from gflowtrl.pipeline.plots import titles_of
from gflowtrl.pipeline.run_report import aligned, interval_text


OWN = ROOT / "benchmarks" / "quality" / "recipes" / "exposed"
TEACHERS = ("most_popular", "ease")
RECIPES = [
    *(OWN / f"{name}.yaml" for name in TEACHERS),
    ROOT / "recipes" / "gflowgr_yahoo.yaml",
    *(OWN / f"{name}.yaml" for name in ("plain", "popularity", "propensity", "uniform", "vargrad")),
]
LOG = ["item_recall@10", "snips_item_recall@10"]  # what the log says


def rows_of(runs: dict[str, list[Path]]) -> dict[str, list[tuple[dict, dict, dict, dict | None]]]:
    """Map each title to one (exposed metrics, metrics of the log, of each user, of the control's users) per seed.

    Methods that the recipes share are taken from the first recipe that has them.
    """
    rows: dict[str, list] = {}
    owner: dict[str, str] = {}
    for name, files in runs.items():
        for file in files:
            record, users = json.loads(file.read_text()), load_file(exposed_file(file))
            for method, entry in record["exposed"]["methods"].items():
                title = titles_of(record["recipe"])[method]
                if method == "gflownet":
                    title = f"{title}: {name}"
                elif method == "teacher":
                    title = f"{title}: {record['recipe']['teacher']['type']}"
                if owner.setdefault(title, name) == name:
                    own, control = (of_method(users, name) for name in (method, "control"))
                    log = record["methods"][method]["metrics"]
                    rows.setdefault(title, []).append((entry["metrics"], log, own, control or None))
    return rows


def of_method(users: dict[str, torch.Tensor], method: str) -> dict[str, torch.Tensor]:
    """The figures of one method in the file of a record."""
    return {name.partition("/")[2]: values for name, values in users.items() if name.startswith(f"{method}/")}


def table(runs: dict[str, list[Path]]) -> str:
    """Return a Markdown table: mean ± standard deviation over seeds, and the difference to the run's control.

    Differences have a 95 % interval over users, whose figures are averaged over the seeds first.
    """
    headings = ["method", *exposed_headings(), "log: Recall@10", "log: SNIPS Recall@10"]
    lines = [[*headings, "NDCG@5 - control", "AUC - control"]]
    for title, seeds in rows_of(runs).items():
        cells = [spread([metrics[name] for metrics, *_ in seeds]) for name in EXPOSED_NAMES]
        cells += ["" if name not in seeds[0][1] else spread([log[name] for _, log, *_ in seeds]) for name in LOG]
        for name in ("ndcg@5", "auc"):
            own, control = [users[name] for _, _, users, _ in seeds], [users and users[name] for *_, users in seeds]
            shown = "GFlowNet" in title and all(values is not None for values in control)
            cells.append(difference(own, control) if shown else "")
        lines.append([title, *cells])
    return aligned(lines)


def plot(runs: dict[str, list[Path]], file: Path) -> None:
    """Draw what the log says of each method against what randomly shown items say: means over seeds.

    Popularity is far below all others, and left out.
    """
    figure, axes = plt.subplots(figsize=(9.5, 4.6))
    colors = iter(plt.get_cmap("tab20").colors)
    for title, seeds in rows_of(runs).items():
        log = [found["item_recall@10"] for _, found, *_ in seeds if "item_recall@10" in found]
        if log and "popularity" not in title.partition("Teacher: ")[2]:
            marker = "o" if "GFlowNet" in title else "s" if "Teacher" in title else "D"
            truth = fmean(metrics["ndcg@5"] for metrics, *_ in seeds)
            axes.scatter(fmean(log), truth, 60, marker=marker, color=next(colors), label=title)
    axes.set_xlabel("Recall@10 of the log (leave-one-out)")
    axes.set_ylabel("NDCG@5 of items shown at random")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=100, metadata={"Software": None})


def difference(own: list[torch.Tensor], control: list[torch.Tensor]) -> str:
    return interval_text(paired_difference(torch.stack(own).mean(0), torch.stack(control).mean(0)))


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(output_dir="outputs/yahoo")
    parser.add_argument("--plot", type=Path, help="file for the figure")
    given, runs = kept_runs(parser, RECIPES, "yahoo")
    if given.plot is not None:
        matplotlib.use("Agg")
        plot(runs, given.plot)
    print(f"\n{len(given.seeds)} seed(s), exposed items:\n\n{table(runs)}")


if __name__ == "__main__":
    main()
