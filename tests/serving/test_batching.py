"""The worker's queue: which jobs are batched, and that every job is answered."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait

import pytest

from gflowtrl.serving.batching import Job, Unavailable, Worker
from gflowtrl.serving.limits import Limits


class Harness:
    """A worker that can be blocked until `release`, with a record of the rows of each call."""

    def __init__(self, **limits):
        self.calls: list[list] = []
        self.batches: list[int] = []
        self.released, self.busy = threading.Event(), threading.Event()
        self.worker = Worker(Limits(**limits), self.batches.append)
        self.worker.start()

    def block(self) -> None:
        self.submit(["blocked"], None, self._wait)
        assert self.busy.wait(5)

    def release(self) -> None:
        self.released.set()

    def submit(self, rows: list, key, work=None):
        return self.worker.submit(Job(work or self._double, rows, key))

    def _wait(self, rows: list) -> list:
        self.busy.set()
        assert self.released.wait(5)
        return rows

    def _double(self, rows: list) -> list:
        self.calls.append(rows)
        return [2 * row for row in rows]


@pytest.fixture
def harness(request) -> Iterator[Harness]:
    harness = Harness(**getattr(request, "param", {}))
    yield harness
    harness.release()
    harness.worker.stop()


def results(futures: list) -> list:
    return [future.result(timeout=5) for future in futures]


def test_equal_keys_are_batched_and_each_job_gets_its_rows(harness):
    harness.block()
    futures = [harness.submit([row, row + 1], key) for row, key in ((0, "a"), (10, "b"), (20, "a"), (30, "b"))]
    harness.release()
    assert results(futures) == [[0, 2], [20, 22], [40, 42], [60, 62]]
    assert harness.calls == [[0, 1, 20, 21], [10, 11, 30, 31]]  # the oldest first
    assert harness.batches == [1, 4, 4]


def test_jobs_without_a_key_are_done_alone(harness):
    harness.block()
    futures = [harness.submit([row], None) for row in range(3)]
    harness.release()
    assert results(futures) == [[0], [2], [4]] and harness.calls == [[0], [1], [2]]


@pytest.mark.parametrize("harness", [{"max_batch": 4}], indirect=True)
def test_a_batch_has_a_maximum_of_rows_and_no_request_is_split(harness):
    harness.block()
    futures = [harness.submit([row] * count, "a") for row, count in enumerate((3, 1, 2, 9, 1))]
    harness.release()
    results(futures)
    assert [len(rows) for rows in harness.calls] == [4, 2, 9, 1]


@pytest.mark.parametrize("harness", [{"max_wait_ms": 250.0}], indirect=True)
def test_an_idle_worker_waits_for_more_jobs_for_a_limited_time(harness):
    futures = [harness.submit([1], "a"), harness.submit([2], "a")]
    assert results(futures) == [[2], [4]] and harness.calls == [[1, 2]]


@pytest.mark.parametrize("harness", [{"max_wait_ms": 1e6, "max_batch": 3}], indirect=True)
def test_the_worker_does_not_wait_if_waiting_is_useless(harness):
    results([harness.submit([row], "a") for row in range(3)])  # a full batch
    results([harness.submit([3], "a"), harness.submit([4], "b")][:1])  # a job with another key waits for the model
    assert harness.calls == [[0, 1, 2], [3]]


def test_an_exception_affects_only_its_own_request_and_the_worker_continues(harness):
    def work(rows: list) -> list:
        if "bad" in rows:
            raise RuntimeError("this row breaks the model")
        return rows

    harness.block()
    futures = [harness.submit([row], "a", work) for row in ("good", "bad", "better")]
    harness.release()
    wait(futures, timeout=5)
    assert results([futures[0], futures[2]]) == [["good"], ["better"]]
    with pytest.raises(RuntimeError, match="this row breaks the model"):
        futures[1].result()
    assert results([harness.submit([4], "a")]) == [[8]]


@pytest.mark.parametrize("harness", [{"max_queue": 2}], indirect=True)
def test_a_full_queue_refuses_jobs_and_canceled_jobs_leave_it(harness):
    harness.block()
    canceled, kept = harness.submit([1], "a"), harness.submit([2], "a")
    with pytest.raises(Unavailable, match="2 requests are waiting"):
        harness.submit([3], "a")
    canceled.cancel()
    assert harness.worker.queue_length == 1
    late = harness.submit([4], "a")
    harness.release()
    assert results([kept, late]) == [[4], [8]] and harness.calls == [[2, 4]]


def test_stopping_finishes_queued_jobs_and_refuses_new_ones(harness):
    harness.block()
    futures = [harness.submit([row], None) for row in range(5)]
    stopping = threading.Thread(target=harness.worker.stop)
    stopping.start()
    while harness.worker.problem is None:
        time.sleep(0.001)
    with pytest.raises(Unavailable, match="The server is stopping"):
        harness.submit([9], "a")
    harness.release()
    stopping.join(5)
    assert all(future.done() for future in futures) and results(futures) == [[2 * row] for row in range(5)]
    harness.worker.start()
    assert results([harness.submit([7], "a")]) == [[14]]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_k": 0}, "max_k is 0; it must be a whole number of at least 1"),
        ({"max_wait_ms": -1.0}, "max_wait_ms is -1.0"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms is nan"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"body_timeout_s": 0.0}, "body_timeout_s is 0.0"),
        ({"grace_s": -1.0}, "grace_s is -1.0"),
    ],
)
def test_invalid_limits_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        Limits(**limits)
