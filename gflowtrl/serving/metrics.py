"""Counters and histograms in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How many values were at most so large.

    Args:
        bounds: rising upper bounds, inclusive; values beyond the last one count in `+Inf`.
    """

    def __init__(self, bounds: Sequence[float]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: str = "") -> Iterator[str]:
        """The histogram's lines; `labels` as they stand between braces."""
        total = 0
        for bound, count in zip([*self.bounds, "+Inf"], self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels}{"," if labels else ""}le="{bound}"}} {total}'
        braces = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braces} {self.sum}"
        yield f"{name}_count{braces} {total}"


class Metrics:
    """What a server counts; every method may be called from any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(SECONDS))
        self._batches = Histogram(ROWS)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[path, status] += 1
            self._seconds[path].observe(seconds)

    def count_batch(self, rows: int) -> None:
        with self._lock:
            self._batches.observe(rows)

    def text(self, queue_length: int) -> str:
        """All metrics, one a line; the queue's length is known elsewhere."""
        with self._lock:
            lines = _head("requests_total", "counter", "Requests that were answered, by path and status.")
            lines += [
                f'gflowtrl_requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(self._requests.items())
            ]
            lines += _head("request_seconds", "histogram", "Seconds from a request's arrival to its answer.")
            for path, histogram in sorted(self._seconds.items()):
                lines += histogram.lines("gflowtrl_request_seconds", f'path="{path}"')
            lines += _head("batch_histories", "histogram", "Histories that were decoded or explained together.")
            lines += self._batches.lines("gflowtrl_batch_histories")
            lines += _head("queue_length", "gauge", "Requests that wait for the model.")
            lines.append(f"gflowtrl_queue_length {queue_length}")
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP gflowtrl_{name} {text}", f"# TYPE gflowtrl_{name} {kind}"]
