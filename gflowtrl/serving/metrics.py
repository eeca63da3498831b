"""Counters and histograms in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Name of each metric -> type and help text.
ABOUT = {
    "requests_total": ("counter", "Requests that were answered, by path and status."),
    "request_seconds": ("histogram", "Seconds from a request's arrival to its answer."),
    "batch_histories": ("histogram", "Histories that were decoded or explained together."),
    "queue_length": ("gauge", "Requests that wait for the model."),
}


class Metrics:
    """Counters and histograms of a server. Every method is thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        # metric -> rest of the line between the metric's name and the value -> value
        self._lines: dict[str, Counter[str]] = {name: Counter() for name in ABOUT}
        self._observe("batch_histories", ROWS, 0, times=0)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        with self._lock:
            self._lines["requests_total"][_braces(f'path="{path}"', f'status="{status}"')] += 1
            self._observe("request_seconds", SECONDS, seconds, f'path="{path}"')

    def count_batch(self, rows: int) -> None:
        """Count a batch of so many histories or explanations."""
        with self._lock:
            self._observe("batch_histories", ROWS, rows)

    def _observe(self, name: str, bounds: Sequence[float], value: float, *labels: str, times: int = 1) -> None:
        """Add a value to a histogram. A bucket counts all values up to and including its bound."""
        lines = self._lines[name]
        for bound in (*bounds, "+Inf"):
            lines["_bucket" + _braces(*labels, f'le="{bound}"')] += times * (value <= float(bound))
        lines["_sum" + _braces(*labels)] += times * float(value)
        lines["_count" + _braces(*labels)] += times

    def text(self, queue_length: int) -> str:
        """Return all metrics in the text format, together with the length of the queue."""
        with self._lock:
            self._lines["queue_length"][""] = queue_length
            text = ""
            for name, (kind, help) in ABOUT.items():
                text += f"# HELP gflowtrl_{name} {help}\n# TYPE gflowtrl_{name} {kind}\n"
                text += "".join(f"gflowtrl_{name}{line} {value}\n" for line, value in self._lines[name].items())
            return text


def _braces(*labels: str) -> str:
    return f"{{{','.join(labels)}}}" if labels else ""
