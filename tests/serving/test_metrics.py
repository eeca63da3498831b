"""Metrics in Prometheus' text format."""

import re

from gflowtrl.serving.metrics import Metrics


def test_histograms_are_cumulative_and_bounds_are_inclusive():
    metrics = Metrics()
    for rows in (1, 2, 2, 3, 1000):
        metrics.count_batch(rows)
    lines = metrics.text(3).splitlines()
    buckets = [line.split()[1] for line in lines if line.startswith("gflowtrl_batch_histories_bucket")]
    assert buckets == ["1", "3", "4", "4", "4", "4", "4", "4", "4", "5"]
    assert "gflowtrl_batch_histories_sum 1008.0" in lines and "gflowtrl_batch_histories_count 5" in lines
    assert "gflowtrl_queue_length 3" in lines


def test_every_line_follows_the_format():
    metrics = Metrics()
    metrics.count_request("/recommend", 200, 0.02)
    metrics.count_request("/recommend", 422, 0.001)
    text = metrics.text(0)
    assert text.endswith("\n")
    label = r'\w+="[^"\\]*"'
    value = rf"gflowtrl_\w+(\{{{label}(,{label})*\}})? \d+(\.\d+)?"
    assert all(re.fullmatch(rf"# (HELP|TYPE) gflowtrl_\w+ .+|{value}", line) for line in text.splitlines())
    assert 'gflowtrl_requests_total{path="/recommend",status="422"} 1' in text
    assert 'gflowtrl_request_seconds_bucket{path="/recommend",le="0.025"} 2' in text
    assert 'gflowtrl_request_seconds_bucket{path="/recommend",le="0.01"} 1' in text
