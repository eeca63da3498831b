"""Counters and histograms of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one application, in their own registry, so that a process may have several applications."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        text = "Requests that were answered, by path and status."
        self.requests = Counter("gflowtrl_requests_total", text, ["path", "status"], registry=registry)
        text = "Seconds from a request's arrival to its answer."
        self.seconds = Histogram("gflowtrl_request_seconds", text, ["path"], buckets=SECONDS, registry=registry)
        text = "Histories that were decoded or explained together."
        self.batches = Histogram("gflowtrl_batch_histories", text, buckets=ROWS, registry=registry)
        text = "Changes of the catalog."
        self.swaps = Counter("gflowtrl_catalog_swaps_total", text, registry=registry)
        self.queue = Gauge("gflowtrl_queue_length", "Requests that wait for the model.", registry=registry)
