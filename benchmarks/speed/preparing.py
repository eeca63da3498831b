"""Time and memory of `prepare` for a large dump, without the memory of the imported library.

    OMP_NUM_THREADS=1 python benchmarks/speed/preparing.py --out benchmarks/results/speed/preparing.json

The reviews of random users and items are in the format of Amazon's dump of 2014, one half in each of two files. Items
follow a power law; users write few or many reviews. The files are in a temporary folder (1 GB with the defaults); the
data folder is written there, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measuring import peak, report, reset_peak

from gflowtrl.data import prepare


_BLOCK = 100_000
MIB = 1 << 20


def reviews(count: int, users: int, items: int, text: str, seed: int) -> Iterator[str]:
    """Yield the lines of a file in blocks."""
    random = np.random.default_rng(seed)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        rows = zip(
            (users * random.random(size) ** 3).astype(int).tolist(),
            (items * random.random(size) ** 2).astype(int).tolist(),
            random.integers(1_300_000_000, 1_400_000_000, size).tolist(),
            strict=True,
        )
        yield "".join(
            f'{{"reviewerID": "A{user:013}", "asin": "B{item:09}", "overall": 5.0, "reviewText": "{text}", '
            f'"unixReviewTime": {moment}}}\n'
            for user, item, moment in rows
        )


def write_dump(folder: Path, count: int, users: int, items: int, characters: int) -> list[Path]:
    files = [folder / f"reviews_{part}.json" for part in range(2)]
    for seed, file in enumerate(files):
        with file.open("w") as out:
            out.writelines(reviews(count // 2, users, items, "x" * characters, seed))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(device=torch.device("cpu"))  # the memory of the process is measured
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--interactions", type=int, default=2_000_000, help="number of reviews in both files")
    parser.add_argument("--users", type=int, default=630_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--characters", type=int, default=300, help="length of a review's text")
    given = parser.parse_args()
    rows = []
    for k_core in (5, None):
        with tempfile.TemporaryDirectory() as folder:
            files = write_dump(Path(folder), given.interactions, given.users, given.items, given.characters)
            file_bytes = sum(file.stat().st_size for file in files)
            before, start = reset_peak(given.device), time.perf_counter()
            data, counts = prepare("amazon-2014", files, out=Path(folder, "out"), k_core=k_core)
            seconds, most = time.perf_counter() - start, peak(given.device)
        sizes = {"file": file_bytes, "before": before, "peak": most - before}
        rows.append(
            {"k_core": k_core or "none", "seconds": seconds, "read": counts.steps[0], "kept": counts.steps[-1]}
            | {"mib": {name: round(size / MIB, 1) for name, size in sizes.items()}}
        )
        print(f"{counts.summary()}\n")
        del data
    columns = {
        "k-core": "{k_core}",
        "interactions read": "{read[interactions]:,}",
        "users": "{read[users]:,}",
        "items": "{read[items]:,}",
        "files, MiB": "{mib[file]:.0f}",
        "before, MiB": "{mib[before]:.0f}",
        "peak minus before, MiB": "{mib[peak]:.0f}",
        "seconds": "{seconds:.0f}",
    }
    report(rows, columns, given)


if __name__ == "__main__":
    main()
