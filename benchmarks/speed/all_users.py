"""Users per second of `gflowtrl recommend --data_dir`, its memory, and what is left after it was killed.

    OMP_NUM_THREADS=1 python benchmarks/speed/all_users.py --out benchmarks/results/speed/all_users.json

A random Llama over random items answers random users. The command is started, measured for --seconds, killed, started
again and measured again, so the time for all users is an extrapolation. The rate of each third of a measurement shows
whether it is steady.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import arguments, llama, random_catalog, report

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


def peak_mib(process: int) -> float:
    """Peak resident memory of a process, without its children."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/{process}/status has no VmHWM.")


def measure(command: list[str], parts: Path, seconds: float) -> dict[str, float | list[float]]:
    """Run the command until it has answered for `seconds` since its first new part, and kill it."""
    before, started = set(parts.glob("part-*")), time.perf_counter()
    child = subprocess.Popen(command)
    try:
        while not set(parts.glob("part-*")) - before:
            if child.poll() is not None:
                sys.exit("The command has ended.")
            time.sleep(0.05)
        first, counts = time.perf_counter(), [len(list(parts.glob("part-*")))]
        for _ in range(3):
            time.sleep(seconds / 3)
            counts.append(len(list(parts.glob("part-*"))))
        memory = peak_mib(child.pid)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    rates = [
        (after - before) * USERS_PER_PART / (seconds / 3) for before, after in zip(counts, counts[1:], strict=False)
    ]
    return {"seconds_to_first_part": first - started, "users_per_second": rates, "parent_peak_mib": memory}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120.0, help="length of each of the two measurements")
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
            row = measure(command, parts, given.seconds)
            changed = [file.name for file, when in kept.items() if file.stat().st_mtime_ns != when]
            kept = {file: file.stat().st_mtime_ns for file in parts.glob("part-*")}
            rate = sum(row["users_per_second"]) / 3
            rows.append({"run": run, **row, "parts_written_again": len(changed), "parts": len(kept)})
            rows[-1]["extrapolated_hours"] = given.users / rate / 3600
            print(json.dumps(rows[-1]), flush=True)
    report(rows, given)


if __name__ == "__main__":
    main()
