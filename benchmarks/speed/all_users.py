"""Users per second of `gflowtrl recommend --data_dir`, its memory, and what is left after it was killed.

    OMP_NUM_THREADS=1 python benchmarks/speed/all_users.py --out benchmarks/results/speed/all_users.json

A random Llama over random items answers random users. The command is started, measured for --parts, killed, started
again and measured again, so the time for all users is an extrapolation. The rates of the parts show whether it is
steady.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np
import torch
from measuring import arguments, llama, peak_of, random_catalog, report

from gflowtrl import Recommender
from gflowtrl.pipeline.all_users import USERS_PER_PART


MIB = 1 << 20


def write_users(folder: Path, users: int, items: int) -> None:
    """Write the data folder; users have 3 to 20 items."""
    random = np.random.default_rng(0)
    folder.mkdir()
    with (folder / "sequences.jsonl").open("w") as out:
        for user, length in enumerate(random.integers(3, 21, users).tolist()):
            out.write(json.dumps({"user": user, "items": random.integers(0, items, length).tolist()}) + "\n")


def measure(command: list[str], folder: Path, parts: int) -> dict[str, Any]:
    """Run the command until it has written so many new parts, and kill it in the middle of the next one."""
    before, started = set(folder.glob("part-*")), time.time()
    child = subprocess.Popen(command)
    try:
        while len(new := set(folder.glob("part-*")) - before) < parts:
            if child.poll() is not None:
                sys.exit("The command has ended.")
            time.sleep(0.05)
        time.sleep(2)
        memory = peak_of(child.pid) / MIB
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    times = sorted(file.stat().st_mtime for file in new)
    rates = [USERS_PER_PART / (later - earlier) for earlier, later in pairwise(times)]
    return {"seconds_to_first_part": times[0] - started, "users_per_second": rates, "peak_mib": memory}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parts", type=int, default=5, help="parts of each of the two measurements, at least 2")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        catalog, tokenizer = random_catalog(given.items)
        model, data, output = (Path(scratch, name) for name in ("model", "data", "recs.parquet"))
        counts = torch.ones(len(catalog), dtype=torch.long)
        Recommender(llama(len(tokenizer)), tokenizer, catalog, item_counts=counts).save_pretrained(model)
        write_users(data, given.users, given.items)
        words = ["--model", model, "--data_dir", data, "--output", output, "--processes", given.processes]
        command = [sys.executable, "-m", "gflowtrl", "recommend", *map(str, words)]
        parts, kept = Path(f"{output}.parts"), {}
        for run in ("first", "after the kill"):
            row = measure(command, parts, given.parts)
            changed = [file.name for file, when in kept.items() if file.stat().st_mtime_ns != when]
            kept = {file: file.stat().st_mtime_ns for file in parts.glob("part-*")}
            rate = harmonic_mean(row["users_per_second"])
            rows.append({"run": run, **row, "rate": rate, "parts_written_again": len(changed), "parts": len(kept)})
            rows[-1]["extrapolated_hours"] = given.users / rate / 3600
            print(json.dumps(rows[-1]), flush=True)
    columns = {
        "run": "{run}",
        "users per second": "{rate:,.0f}",
        "s to the first part": "{seconds_to_first_part:.0f}",
        "peak MiB": "{peak_mib:,.0f}",
        "parts": "{parts}",
        "written again": "{parts_written_again}",
        "hours for all": "{extrapolated_hours:.1f}",
    }
    report(rows, columns, given)


if __name__ == "__main__":
    main()
