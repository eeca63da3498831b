"""Time and memory of `prepare` for large logs.

    OMP_NUM_THREADS=1 python benchmarks/speed/preparing.py --out benchmarks/results/speed/preparing.json

Reviews of random users and items in the format of Amazon's dump of 2014, one half in each of two files, with and
without the 5-core, and events as JSON lines and as Parquet, written as JSON lines and as Parquet. Items follow a power
law; users write few or many reviews. The files are in a temporary folder (1 GB with the defaults); the data folder is
written there, too. Each row is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measuring import in_own_process, peak, report, reset_peak

from gflowtrl.data import prepare


_BLOCK = 100_000
MIB = 1 << 20
#: Name of the input -> format, k-core, and whether Parquet is written.
INPUTS = {
    "reviews, 5-core": ("amazon-2014", 5, False),
    "reviews": ("amazon-2014", None, False),
    "events, JSON lines": ("jsonl", None, False),
    "events, Parquet": ("parquet", None, True),
}


def interactions(count: int, users: int, items: int, seed: int) -> Iterator[tuple[list[str], list[str], list[int]]]:
    """Yield users, items and times in blocks."""
    random = np.random.default_rng(seed)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        numbers = (users * random.random(size) ** 3).astype(int), (items * random.random(size) ** 2).astype(int)
        times = random.integers(1_300_000_000, 1_400_000_000, size)
        yield [f"A{user:013}" for user in numbers[0]], [f"B{item:09}" for item in numbers[1]], times.tolist()


def write_log(format: str, folder: Path, given: argparse.Namespace) -> list[Path]:
    """Write a log in one of the formats."""
    ending = "parquet" if format == "parquet" else "json"
    files = [folder / f"log_{part}.{ending}" for part in range(2)]
    count = given.reviews if format == "amazon-2014" else given.events
    for seed, file in enumerate(files):
        blocks = interactions(count // 2, given.users, given.items, seed)
        if format == "parquet":
            names = ["user_id", "item_id", "timestamp"]
            with pq.ParquetWriter(file, pa.table([["u"], ["i"], [1]], names).schema) as writer:
                for block in blocks:
                    writer.write_table(pa.table(list(block), names))
            continue
        text = f'"overall": 5.0, "reviewText": "{"x" * given.characters}", '
        line = (
            f'{{"reviewerID": "%s", "asin": "%s", {text}"unixReviewTime": %d}}\n'
            if format == "amazon-2014"
            else '{"user_id": "%s", "item_id": "%s", "timestamp": %d}\n'
        )
        with file.open("w") as out:
            for block in blocks:
                out.writelines(line % row for row in zip(*block, strict=True))
    return files


def measure(name: str, given: argparse.Namespace) -> dict:
    """Return the row of one input."""
    format, k_core, parquet = INPUTS[name]
    with tempfile.TemporaryDirectory() as folder:
        files = write_log(format, Path(folder), given)
        file_bytes = sum(file.stat().st_size for file in files)
        before, start = reset_peak(given.device), time.perf_counter()
        _, counts = prepare(format, files, out=Path(folder, "out"), k_core=k_core, parquet=parquet)
        seconds, most = time.perf_counter() - start, peak(given.device)
    sizes = {"file": file_bytes, "before": before, "peak": most}
    return {
        "input": name,
        "seconds": seconds,
        "per_second": counts.steps[0]["interactions"] / seconds,
        "read": counts.steps[0],
        "kept": counts.steps[-1],
        "mib": {name: round(size / MIB, 1) for name, size in sizes.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(device=torch.device("cpu"))  # the memory of the process is measured
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--only", choices=INPUTS, help="measure one input and print its row as JSON")
    parser.add_argument("--reviews", type=int, default=2_000_000, help="number of reviews in both files")
    parser.add_argument("--events", type=int, default=10_000_000, help="number of events in both files")
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--characters", type=int, default=300, help="length of a review's text")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given)))
        return
    rows = []
    for name in INPUTS:
        rows.append(in_own_process("--only", name))
        print(f"{name}: {rows[-1]['seconds']:.1f} s", flush=True)
    columns = {
        "input": "{input}",
        "interactions read": "{read[interactions]:,}",
        "users": "{read[users]:,}",
        "items": "{read[items]:,}",
        "files, MiB": "{mib[file]:.0f}",
        "before, MiB": "{mib[before]:.0f}",
        "peak, MiB": "{mib[peak]:.0f}",
        "seconds": "{seconds:.1f}",
        "interactions per second": "{per_second:,.0f}",
    }
    report(rows, columns, given)


if __name__ == "__main__":
    main()
