"""Accuracy against breadth for several rewards, on real data, one seed: what broadens the recommendations?

    python benchmarks/quality/breadth.py --data_dir DIR

The teacher, SFT and control are shared with benchmarks/quality/office.py through --output_dir. Runs with a record in
benchmarks/results/quality/ are not repeated. Prints a table, sorted by coverage, and draws breadth.png in that folder.
"""

import torch
from matplotlib.figure import Figure
from office import HEADINGS, KEPT, ROOT, figures, kept_run, make_parser, places

from gflowtrl.pipeline import load_recipe
from gflowtrl.pipeline.build import fit_teacher
from gflowtrl.pipeline.run_data import prepare
from gflowtrl.pipeline.run_report import aligned
from gflowtrl.pipeline.stage import RunContext


def reward(target: float, teacher: float, options: str = "", ease: float = 0.0) -> list[str]:
    """Return the recipe options of a reward: weights of target and teacher, options of the teacher, weight of EASE."""
    parts = [f"{{type: ground_truth, weight: {target}}}", f"{{type: collaborative, weight: {teacher}{options}}}"]
    if ease:
        parts.append(f"{{type: collaborative, weight: {ease}, teacher: {{type: ease}}}}")
    return [f"--rewards=[{', '.join(parts)}]"]


SETTINGS = {
    "target .3, teacher .7": reward(0.3, 0.7),
    "target .8, teacher .2": reward(0.8, 0.2),
    "teacher temperature 0.7": reward(0.3, 0.7, ", temperature: 0.7"),
    "teacher temperature 1.5": reward(0.3, 0.7, ", temperature: 1.5"),
    "popularity correction .5": reward(0.3, 0.7, ", popularity_correction: 0.5"),
    "popularity correction 1": reward(0.3, 0.7, ", popularity_correction: 1.0"),
    "EASE .35 mixed in": reward(0.3, 0.35, ease=0.35),
    "target .6, teacher .4, popularity correction .5": reward(0.6, 0.4, ", popularity_correction: 0.5"),
    "teacher temperature 0.7, popularity correction .5": reward(
        0.3, 0.7, ", temperature: 0.7, popularity_correction: 0.5"
    ),
}


def table(records: dict[str, dict]) -> str:
    """Return a Markdown table sorted by coverage, the highest first."""
    first = next(iter(records.values()))["methods"]
    rows = {"Teacher": first["teacher"], "SFT": first["sft"], "SFT continued (control)": first["control"]}
    rows |= {name: record["methods"]["gflownet"] for name, record in records.items()}
    lines = [["reward", *HEADINGS]]
    for name, entry in sorted(rows.items(), key=lambda row: -row[1]["metrics"]["coverage@10"]):
        lines.append([name, *figures([entry["metrics"]])])
    return aligned(lines)


def particular(recipe_options: list[str]) -> str:
    """Return a Markdown table of the mutual information of user and item in a teacher's softmax, in nats.

    It is computed over the validation users: the entropy of the mean distribution minus the mean entropy.
    """
    recipe = load_recipe(ROOT / "recipes" / "gflowgr_office_llama.yaml", recipe_options)
    run_data, context = prepare(recipe), RunContext(recipe.output_dir, quiet=True)
    histories = run_data.splits.validation["history"]
    lines = [["teacher", "temperature", "mean entropy", "mutual information"]]
    for spec in (recipe.teacher, {"type": "ease"}):
        scores = fit_teacher(context, run_data, spec).score(histories).detach()
        for temperature in (0.7, 1.0, 1.5):
            probs = (scores / temperature).softmax(1)
            entropy, of_mean = torch.special.entr(probs).sum(1).mean(), torch.special.entr(probs.mean(0)).sum()
            lines.append([spec["type"], str(temperature), f"{entropy:.2f}", f"{of_mean - entropy:.2f}"])
    return aligned(lines)


def plot(records: dict[str, dict]) -> None:
    """Plot NDCG@10 over coverage@10, one numbered dot per method or reward, the highest coverage first."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    shared = next(iter(records.values()))["methods"]
    dots = {name: (record["methods"]["gflownet"], "C0") for name, record in records.items()}
    dots |= {
        "Teacher": (shared["teacher"], "C2"),
        "SFT continued (control)": (shared["control"], "C3"),
        "SFT": (shared["sft"], "C1"),
    }
    ordered = sorted(dots.items(), key=lambda dot: -dot[1][0]["metrics"]["coverage@10"])
    for number, (name, (entry, color)) in enumerate(ordered, 1):
        x, y = entry["metrics"]["coverage@10"], entry["metrics"]["ndcg@10"]
        axes.scatter(x, y, s=160, color=color, label=f"{number}  {name}", alpha=0.85)
        axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=8, color="white")
    error = 1.96 * shared["control"]["standard_errors"]["ndcg@10"]
    axes.set(
        xlabel="coverage@10",
        ylabel=f"NDCG@10 (95 % over users: about ± {error:.4f})",
        title="Exact flows by reward, one seed",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, markerscale=0.5, frameon=False)
    axes.margins(0.1)
    figure.savefig(KEPT / "breadth.png", dpi=130)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    given = parser.parse_args()
    options = places(given, given.seed)
    records = {}
    for name in given.settings:
        file = KEPT / f"breadth-{list(SETTINGS).index(name)}-seed{given.seed}.json"
        records[name] = kept_run("gflowgr_office_llama", [*options, *SETTINGS[name]], file)
        print(f"\n{table(records)}\n")
    plot(records)
    print(particular(options))


if __name__ == "__main__":
    main()
