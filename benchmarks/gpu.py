"""All GPU measurements in one run of a few minutes, the most important parts first.

    python benchmarks/gpu.py --out benchmarks/results/speed/gpu.json
    python benchmarks/gpu.py --out FILE.json --only lora synchronizations --minutes 4
    python benchmarks/gpu.py --out FILE.json --device cpu --small    # the same code in tiny sizes, about a minute

A part starts only if there is enough time left for it, and is stopped after 1.5 times its expected time. The file is
rewritten atomically after every row, so nothing is lost if the run is killed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any


START = time.monotonic()  # the imports count, too
ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "benchmarks" / "speed")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch  # noqa: E402

from benchmarks.gpu_parts.exactness import exactness, trained_total_variation  # noqa: E402
from benchmarks.gpu_parts.lora import lora  # noqa: E402
from benchmarks.gpu_parts.settings import Row, Rows, RunSettings  # noqa: E402
from benchmarks.gpu_parts.synchronizations import count_all  # noqa: E402
from benchmarks.gpu_parts.training import training  # noqa: E402
from benchmarks.quality.total_variation import environment  # noqa: E402
from gflowtrl.files import write_text  # noqa: E402


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        seconds: maximum time on a large GPU; an estimate, because no part has run on one yet.
        rows: yields functions that measure one row of the results each.
        needs_cuda: the part is skipped on other devices.
    """

    seconds: float
    rows: Callable[[RunSettings], Rows]
    needs_cuda: bool = False


PARTS = {
    "exactness": Part(40, exactness),
    "total_variation": Part(80, trained_total_variation),
    "training_office": Part(80, lambda settings: training(settings, settings.pick("1.2M", "0.2M"))),
    "training_large": Part(70, lambda settings: training(settings, settings.pick("113M", "0.2M"))),
    "synchronizations": Part(40, count_all, needs_cuda=True),
    "lora": Part(90, lora),
}


class OutOfTime(BaseException):
    """Raised if a part takes too long. It is not an `Exception`, which a library might catch."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Context manager: raise `OutOfTime` after `seconds`."""

    def stop(*args: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Run:
    """One run of the parts, and the file of its results.

    Attributes:
        settings: device and size.
        out: the file.
        deadline: end of the run, on the clock of `time.monotonic`.
        report: content of the file.
    """

    settings: RunSettings
    out: Path
    deadline: float
    report: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        write_text(self.out, json.dumps(self.report, indent=2) + "\n")

    def part(self, name: str, part: Part) -> None:
        """Measure a part and record its `status`: "complete", or the reason why it is not complete."""
        entry: dict[str, Any] = {"status": "started", "seconds": 0.0, "rows": []}
        self.report["parts"][name] = entry
        self.write()
        begin = time.monotonic()
        entry["status"] = self._measure(name, part, entry["rows"])
        entry["seconds"] = time.monotonic() - begin
        self.write()
        print(f"{name}: {entry['status']}, {entry['seconds']:.1f} seconds", flush=True)
        gc.collect()
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, name: str, part: Part, rows: list[Row]) -> str:
        left = self.deadline - time.monotonic()
        if part.needs_cuda and self.settings.device.type != "cuda":
            return "needs CUDA"
        if left < part.seconds and not self.settings.small:
            return f"left out: {left:.0f} seconds left"
        limit = max(left if self.settings.small else min(1.5 * part.seconds, left), 0.01)
        try:
            with at_most(limit):
                for measure in part.rows(self.settings):
                    rows.append(_attempt(measure))
                    print(f"{name}: {json.dumps(rows[-1])}", flush=True)
                    self.write()
        except OutOfTime:
            return f"stopped: it took more than {limit:.0f} seconds"
        except Exception as error:  # the other parts are still measured
            return _failure(error)
        failed = sum("failed" in row for row in rows)
        return f"failed: {failed} of {len(rows)} rows" if failed else "complete"


def _attempt(measure: Callable[[], Row]) -> Row:
    """Measure a row, or return its error, so that the other rows are still measured."""
    try:
        return measure()
    except Exception as error:
        return {"failed": _failure(error)}


def _failure(error: Exception) -> str:
    """Print the traceback of an error and return its text for the file."""
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}: {error}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--minutes", type=float, default=9, help="limit for all parts together, including imports")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts, run in this order")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, no time limits per part")
    given = parser.parse_args()
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; give --device cpu --small to run the same code on the CPU.")
    return given


def main() -> int:
    """Run the parts and return the exit status: 1 if a part has failed, otherwise 0."""
    given = arguments()
    settings = RunSettings(given.device, given.small)
    options = ["--minutes", f"{given.minutes:g}", "--device", str(given.device), "--only", *given.only]
    command = shlex.join(["python", "benchmarks/gpu.py", *options, *(["--small"] if given.small else [])])
    run = Run(settings, given.out, START + 60 * given.minutes)
    run.report |= {"command": command, "date": date.today().isoformat(), **environment(), **settings.describe()}
    run.report["versions"] |= {name: metadata.version(name) for name in ("accelerate", "datasets", "peft")}
    run.report |= {"matmul_flops": settings.peak_flops, "parts": {}}
    for name in given.only:
        run.part(name, PARTS[name])
    statuses = [part["status"] for part in run.report["parts"].values()]
    return int(any(status.startswith("failed") for status in statuses))


if __name__ == "__main__":
    sys.exit(main())
