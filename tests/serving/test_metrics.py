"""Metrics for Prometheus."""

import pytest


pytest.importorskip("prometheus_client", reason="serving needs the extra `serve`")

from prometheus_client import REGISTRY, generate_latest  # noqa: E402

from gflowtrl.serving.metrics import Metrics  # noqa: E402


def test_each_application_has_its_own_metrics_and_nothing_else():
    first, second = Metrics(), Metrics()
    first.requests.labels("/recommend", 200).inc()
    first.batches.observe(2)
    text = generate_latest(first.registry).decode()
    assert 'gflowtrl_requests_total{path="/recommend",status="200"} 1.0' in text
    assert 'gflowtrl_batch_histories_bucket{le="2.0"} 1.0' in text  # bounds are inclusive
    assert 'gflowtrl_batch_histories_bucket{le="1.0"} 0.0' in text
    assert all(line.startswith("gflowtrl_") for line in text.splitlines() if line[0] != "#")
    assert b"/recommend" not in generate_latest(second.registry) and b"gflowtrl" not in generate_latest(REGISTRY)
