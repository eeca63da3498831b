"""The worker's queue: who is done together, and that nobody is forgotten."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait

import pytest

from gflowtrl.serving.batching import Failed, Job, Unavailable, Worker
from gflowtrl.serving.limits import Limits


class Desk:
    """A worker that is held until `release`, and what it did: a list of rows for each call."""

    def __init__(self, **limits):
        self.calls: list[list] = []
        self.batches: list[int] = []
        self.held, self.busy = threading.Event(), threading.Event()
        self.worker = Worker(Limits(**limits), self.batches.append)
        self.worker.start()

    def hold(self) -> None:
        self.submit(["held"], None, self._wait)
        assert self.busy.wait(5)

    def release(self) -> None:
        self.held.set()

    def submit(self, rows: list, key, work=None):
        return self.worker.submit(Job(work or self._double, rows, key))

    def _wait(self, rows: list) -> list:
        self.busy.set()
        assert self.held.wait(5)
        return rows

    def _double(self, rows: list) -> list:
        self.calls.append(rows)
        return [2 * row for row in rows]


@pytest.fixture
def desk(request) -> Iterator[Desk]:
    desk = Desk(**getattr(request, "param", {}))
    yield desk
    desk.release()
    desk.worker.stop()


def results(futures: list) -> list:
    return [future.result(timeout=5) for future in futures]


def test_equal_keys_go_together_and_each_gets_its_own_rows(desk):
    desk.hold()
    futures = [desk.submit([row, row + 1], key) for row, key in ((0, "a"), (10, "b"), (20, "a"), (30, "b"))]
    desk.release()
    assert results(futures) == [[0, 2], [20, 22], [40, 42], [60, 62]]
    assert desk.calls == [[0, 1, 20, 21], [10, 11, 30, 31]]  # the oldest first
    assert desk.batches == [1, 4, 4]


def test_what_has_no_key_goes_alone(desk):
    desk.hold()
    futures = [desk.submit([row], None) for row in range(3)]
    desk.release()
    assert results(futures) == [[0], [2], [4]] and desk.calls == [[0], [1], [2]]


@pytest.mark.parametrize("desk", [{"max_batch": 4}], indirect=True)
def test_a_batch_is_bounded_in_rows_and_no_request_is_split(desk):
    desk.hold()
    futures = [desk.submit([row] * count, "a") for row, count in enumerate((3, 1, 2, 9, 1))]
    desk.release()
    results(futures)
    assert [len(rows) for rows in desk.calls] == [4, 2, 9, 1]


@pytest.mark.parametrize("desk", [{"max_wait_ms": 250.0}], indirect=True)
def test_an_idle_worker_waits_for_others_but_not_for_ever(desk):
    futures = [desk.submit([1], "a"), desk.submit([2], "a")]
    assert results(futures) == [[2], [4]] and desk.calls == [[1, 2]]


@pytest.mark.parametrize("desk", [{"max_wait_ms": 1e6, "max_batch": 3}], indirect=True)
def test_nobody_waits_where_nothing_is_gained(desk):
    results([desk.submit([row], "a") for row in range(3)])  # a full batch
    results([desk.submit([3], "a"), desk.submit([4], "b")][:1])  # another one waits for the model
    assert desk.calls == [[0, 1, 2], [3]]


def test_an_exception_reaches_its_own_request_only_and_the_worker_lives_on(desk, caplog):
    def work(rows: list) -> list:
        if "bad" in rows:
            raise RuntimeError("this row breaks the model")
        return rows

    desk.hold()
    futures = [desk.submit([row], "a", work) for row in ("good", "bad", "better")]
    desk.release()
    wait(futures, timeout=5)
    assert results([futures[0], futures[2]]) == [["good"], ["better"]]
    with pytest.raises(Failed, match="RuntimeError"):
        futures[1].result()
    assert "this row breaks the model" in caplog.text
    assert results([desk.submit([4], "a")]) == [[8]]


@pytest.mark.parametrize("desk", [{"max_queue": 2}], indirect=True)
def test_a_full_queue_refuses_and_who_gave_up_makes_room(desk):
    desk.hold()
    given_up, kept = desk.submit([1], "a"), desk.submit([2], "a")
    with pytest.raises(Unavailable, match="2 requests are waiting"):
        desk.submit([3], "a")
    given_up.cancel()
    late = desk.submit([4], "a")
    desk.release()
    assert results([kept, late]) == [[4], [8]] and desk.calls == [[2, 4]]


def test_stopping_answers_what_is_queued_and_takes_nothing_more(desk):
    desk.hold()
    futures = [desk.submit([row], None) for row in range(5)]
    stopping = threading.Thread(target=desk.worker.stop)
    stopping.start()
    while desk.worker.ready:
        time.sleep(0.001)
    with pytest.raises(Unavailable, match="shutting down"):
        desk.submit([9], "a")
    desk.release()
    stopping.join(5)
    assert all(future.done() for future in futures) and results(futures) == [[2 * row] for row in range(5)]
    desk.worker.start()
    assert results([desk.submit([7], "a")]) == [[14]]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_k": 0}, "max_k is 0; it must be a whole number of at least 1"),
        ({"max_wait_ms": -1.0}, "max_wait_ms is -1.0"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms is nan"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
    ],
)
def test_limits_that_are_none_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        Limits(**limits)
