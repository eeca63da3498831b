"""The SYNTHETIC shop, whose users' true preferences are known: does the GFlowNet cure exposure bias?

    python benchmarks/quality/shop.py

Runs the quickstart recipe once per seed; each seed also generates its own shop. The recipe's reward was chosen on the
shop with seed 0, which is not one of these. Runs with a record in benchmarks/results/quality/ are not repeated.
"""

import argparse

from office import KEPT, kept_run

from gflowtrl.pipeline.comparison import spread
from gflowtrl.pipeline.plots import TITLES
from gflowtrl.pipeline.run_report import aligned


COLUMNS = ["unseen_liked_mass", "total_variation", "recall@10", "ndcg@10", "coverage@10", "long_tail@10"]


def table(records: list[dict]) -> str:
    """Return a Markdown table: mean ± standard deviation over the seeds, and the ratio to the control per seed."""
    lines = [["method", *COLUMNS]]
    for method, title in TITLES.items():
        values = [spread([record["methods"][method]["metrics"][name] for record in records]) for name in COLUMNS]
        lines.append([title, *values])
    text = aligned(lines)
    for name in COLUMNS[:2]:
        pairs = [[record["methods"][m]["metrics"][name] for m in ("gflownet", "control")] for record in records]
        ratios = ", ".join(f"{ours / theirs:.2f}" for ours, theirs in pairs)
        text += f"\n\n{name}, GFlowNet / control: {ratios}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--output_dir", default="outputs/shop", help="folder of the stages")
    given = parser.parse_args()
    records = []
    for seed in given.seeds:
        options = ["--output_dir", given.output_dir, "--seed", str(seed), "--data.shop.seed", str(seed)]
        records.append(kept_run("quickstart", options, KEPT / f"shop-seed{seed}.json"))
    print(f"\nSYNTHETIC data, {len(records)} seed(s):\n\n{table(records)}")


if __name__ == "__main__":
    main()
