"""GFlowGR's ablations from one SFT checkpoint on a short schedule: group size, lambda, objective, sampler, reward.

    python benchmarks/quality/ablations.py --data_dir DIR
    python benchmarks/quality/ablations.py --data_dir DIR --studies sampler reward

The teacher and SFT are shared with benchmarks/quality/office.py through --output_dir. The row "lambda 0" is the
control. Runs with a record in benchmarks/results/quality/ are not repeated. Prints a table and draws
ablation-STUDY.png for each study. Replay is not tested, because no prompt occurs twice within 300 steps.
"""

from matplotlib.figure import Figure
from office import HEADINGS, KEPT, figures, kept_run, make_parser, places

from gflowtrl.pipeline.run_report import aligned


STEPS = 300
SCHEDULE = ["--stages", "sft", "gflownet", "--gflownet.max_steps", str(STEPS)]

# Each row makes one change to the paper's configuration; a row without options is that configuration.
GROUND_TRUTH, TEACHER, TOKENS = (
    "{type: ground_truth, weight: 10}",
    "{type: collaborative, normalization: min_max}",
    "{type: token_similarity}",
)


def rewards(*parts: str) -> list[str]:
    return [f"--rewards=[{', '.join(parts)}]"]


def sampler(companion: str) -> list[str]:
    return [f"--sampler={{ground_truth: 1, {companion}: 2}}"]


STUDIES: dict[str, dict[str, list[str]]] = {
    "K": {
        "1 (the target alone)": ["--num_generations", "1", "--sampler", "ground_truth"],
        "3": [],
        "5": ["--num_generations", "5", "--sampler={ground_truth: 1, curriculum: 4}"],
        "15": ["--num_generations", "15", "--sampler={ground_truth: 1, curriculum: 14}"],
    },
    "lambda": {
        "0 (SFT alone)": ["--loss_weights", "1.0", "0.0"],
        "0.01": ["--loss_weights", "1.0", "0.01"],
        "0.1": ["--loss_weights", "1.0", "0.1"],
        "1": [],
        "10": ["--loss_weights", "1.0", "10.0"],
    },
    "objective": {
        "trajectory balance": [],
        "detailed balance": ["--loss_type", "sft", "detailed_balance"],
        "sub-trajectory balance": ["--loss_type", "sft", "subtrajectory_balance"],
        "VarGrad": ["--loss_type", "sft", "vargrad"],
        "contrastive balance": ["--loss_type", "sft", "contrastive_balance"],
    },
    "sampler": {
        "curriculum": [],
        "curriculum, pool of the teacher's best": [
            "--sampler={ground_truth: 1, hard: [{type: curriculum, pool: teacher, pool_size: 50}, 2]}"
        ],
        "unobserved": sampler("unobserved"),
        "collaborative": sampler("collaborative"),
        "low confidence": sampler("low_confidence"),
        "on policy": sampler("on_policy"),
        "beam": sampler("beam"),
        "stochastic beam": sampler("stochastic_beam"),
    },
    "reward": {
        "all three": [],
        "without ground truth": rewards(TEACHER, TOKENS),
        "without teacher": rewards(GROUND_TRUTH, TOKENS),
        "without token similarity": rewards(GROUND_TRUTH, TEACHER),
    },
}


def table(study: str, records: dict[str, dict]) -> str:
    lines = [[study, *HEADINGS]]
    for name, record in records.items():
        metrics = record["methods"]["gflownet"]["metrics"]
        lines.append([name, *figures([metrics])])
    return aligned(lines)


def plot(study: str, records: dict[str, dict]) -> None:
    """Plot NDCG@10 with its 95 % interval over users, and coverage@10, one bar per setting."""
    figure = Figure(figsize=(9, 3 + 0.25 * len(records)), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), ("ndcg@10", "coverage@10"), strict=True):
        entries = [record["methods"]["gflownet"] for record in records.values()]
        errors = [1.96 * entry["standard_errors"].get(metric, 0.0) for entry in entries]
        axes.barh(list(records), [entry["metrics"][metric] for entry in entries], xerr=errors, capsize=2)
        axes.set(xlabel=metric)
    axes.invert_yaxis()
    figure.suptitle(f"{study}: {STEPS} steps from one SFT checkpoint")
    figure.savefig(KEPT / f"ablation-{study}.png", dpi=130)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    given = parser.parse_args()
    for study in given.studies:
        records = {}
        for number, (name, options) in enumerate(STUDIES[study].items()):
            # The paper's configuration is a row of every study and is run once.
            stem = f"{study}-{number}" if options else "paper"
            file = KEPT / f"ablation-{stem}-seed{given.seed}.json"
            records[name] = kept_run("gflowgr_paper", [*places(given, given.seed), *SCHEDULE, *options], file)
        print(f"\n{table(study, records)}\n", flush=True)
        plot(study, records)


if __name__ == "__main__":
    main()
