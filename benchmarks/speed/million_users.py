"""A data folder of a million users: seconds to read it, and seconds and memory until the first step of SFT.

    python benchmarks/speed/million_users.py --out benchmarks/results/speed/million_users.json

Random users with 6 to 14 of 50,000 items (a power law) as Parquet and as JSON lines, which are written to a temporary
folder. `gflowtrl train --stages sft` trains a Llama of 64 dimensions and two layers for three steps, without a
teacher. The memory is the peak of its process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import ROOT, peak_of, report

from gflowtrl.data import InteractionData, read_folder, write_folder
from gflowtrl.data.sequences import Sequences


RECIPE = """base: {base}
name: million
rewards: [{{type: ground_truth}}]
sft: {{max_steps: 3, logging_steps: 1, eval_strategy: "no", save_strategy: "no", load_best_model_at_end: false}}
evaluation: {{users: 100}}
"""


def random_users(users: int, items: int) -> InteractionData:
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(random.integers(6, 15, users))])
    taken = (items * random.random(offsets[-1]) ** 2).astype(np.int32)
    catalog = list(range(items))
    ids = {item: (f"<a_{item % 64}>", f"<b_{item // 64 % 64}>", f"<c_{item // 4096}>") for item in catalog}
    return InteractionData(
        "million", list(range(users)), Sequences(taken, offsets, catalog), catalog, semantic_ids=ids
    )


def first_step(recipe: Path, folder: Path, output_dir: Path) -> tuple[float, float]:
    """Return the seconds from the start of the command to the first step of SFT, and its peak memory."""
    options = ["--data_dir", str(folder), "--output_dir", str(output_dir), "--stages", "sft"]
    command = [sys.executable, "-m", "gflowtrl", "train", "--config", str(recipe), *options]
    start, seconds, memory = time.perf_counter(), float("nan"), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            memory = max(memory, peak_of(process.pid))
            if np.isnan(seconds) and "loss " in line:
                seconds = time.perf_counter() - start
    if process.returncode or np.isnan(seconds):
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}.")
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(device=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=50_000)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch, "million.yaml")
        recipe.write_text(RECIPE.format(base=json.dumps(str(ROOT / "recipes" / "quickstart.yaml"))))
        for parquet in (True, False):
            folder = Path(scratch, "parquet" if parquet else "jsonl")
            write_folder(random_users(given.users, given.items), folder, parquet)
            start = time.perf_counter()
            data = read_folder(folder)
            read, interactions = time.perf_counter() - start, data.num_interactions
            del data
            seconds, memory = first_step(recipe, folder, Path(scratch, f"out_{folder.name}"))
            rows.append(
                {"folder": folder.name, "users": given.users, "interactions": interactions}
                | {"seconds_to_read": read, "seconds_to_first_step": seconds, "peak_memory": memory}
            )
    columns = {
        "sequences": "{folder}", "users": "{users:,}", "interactions": "{interactions:,}",
        "read, s": "{seconds_to_read:.1f}", "first step of SFT, s": "{seconds_to_first_step:.0f}",
        "peak, GiB": "{gib:.2f}",
    }  # fmt: skip
    report([{**row, "gib": row["peak_memory"] / 2**30} for row in rows], columns, given)


if __name__ == "__main__":
    main()
