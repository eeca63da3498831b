"""A queue of requests, and one thread that owns the model and answers them in batches.

Waiting requests with equal settings are decoded together: decoding 20 histories costs little more than decoding one.
This module depends neither on HTTP nor on recommenders.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from .limits import Limits


STOPPING = "The server is stopping. Try again later, or use another server."


class Unavailable(RuntimeError):
    """The queue is full, or the worker is not running."""


@dataclass(eq=False)
class Job:
    """Work for the model.

    Attributes:
        work: function from a list of rows to a list with one result per row.
        rows: the rows of this job.
        key: jobs with equal keys may be done in one call of `work`. None: this job is done alone.
        future: receives the results of the rows, or the exception of `work`.
    """

    work: Callable[[list[Any]], list[Any]]
    rows: list[Any]
    key: Hashable | None
    future: Future = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)


class Worker:
    """A thread that does one batch of jobs at a time: the oldest job, and later jobs with the same key.

    Args:
        limits: `max_batch`, `max_wait_ms` and `max_queue` are used.
        on_batch: called with the number of rows after each batch that has some.

    Attributes:
        problem: a sentence that says why the worker accepts no jobs, or None.
    """

    def __init__(self, limits: Limits, on_batch: Callable[[int], None]):
        self._limits, self._on_batch = limits, on_batch
        self._queue: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self.problem: str | None = "The server is starting. Try again later."

    def start(self) -> None:
        """Start the thread. A stopped worker can be started again."""
        self._stopping, self.problem = False, None
        # A daemon thread, so that the process can end even if a decoding hangs.
        self._thread = threading.Thread(target=self._run, name="gflowtrl-model", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Accept no more jobs, finish the queued ones, and wait for the thread. Call it after `start` only."""
        with self._changed:
            self._stopping, self.problem = True, STOPPING
            self._changed.notify_all()
        self._thread.join()

    @property
    def queue_length(self) -> int:
        """Number of waiting jobs."""
        return len(self._queue)

    def submit(self, job: Job) -> Future:
        """Queue a job and return its future, which receives the results of the rows or the exception of the work.

        A job whose future is canceled before the worker begins with it leaves the queue.

        Raises:
            Unavailable: the queue is full, or the worker is not running.
        """
        with self._changed:
            if self.problem:
                raise Unavailable(self.problem)
            if len(self._queue) >= self._limits.max_queue:
                raise Unavailable(f"The queue is full ({len(self._queue)} requests are waiting). Try again later.")
            self._queue.append(job)
            self._changed.notify_all()
        # The callback must not know the job: a future keeps its callbacks, so that the job, which refers to its future
        # and to the recommender, would be in a cycle, and be freed by a garbage collection only.
        job.future.add_done_callback(self._forget)
        return job.future

    def _forget(self, future: Future) -> None:
        with self._changed:
            self._queue = [waiting for waiting in self._queue if waiting.future is not future]

    def _take(self, jobs: list[Job]) -> None:
        with self._changed:
            self._queue = [waiting for waiting in self._queue if waiting not in jobs]

    # -------------------------------------------------------------------------------------------------- in the thread
    def _run(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
                if batch:
                    self._do(batch)
        finally:
            self.problem = self.problem or "The model's thread has ended with an error; restart the server."

    def _next_batch(self) -> list[Job] | None:
        """Take the next batch out of the queue, or return None if the worker is stopping and the queue is empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            if not self._queue:
                return None
            first = self._queue[0]
            seconds_left = first.queued_at + self._limits.max_wait_ms / 1000 - time.monotonic()
            self._changed.wait_for(lambda: self._stopping or self._batch_of(first)[1], seconds_left)
            batch, _ = self._batch_of(first)
            self._take(batch)
            return batch

    def _batch_of(self, first: Job) -> tuple[list[Job], bool]:
        """Return the first job with the jobs that can be done together with it, and whether waiting is useless."""
        if first.key is None:
            return [first], True
        batch, rows = [], 0
        for job in self._queue:
            if job.key != first.key:
                continue
            rows += len(job.rows)
            if batch and rows > self._limits.max_batch:
                return batch, True
            batch.append(job)
        return batch, rows >= self._limits.max_batch or len(batch) < len(self._queue)

    def _do(self, batch: list[Job]) -> None:
        """Do the work of a batch and set the results of its futures."""
        rows = [row for job in batch for row in job.rows]
        try:
            results = iter(batch[0].work(rows))
        except Exception as error:
            if len(batch) == 1:
                return batch[0].future.set_exception(error)
            for job in batch:  # an error in one request must not affect the others: try each one alone
                self._do([job])
            return
        if rows:
            self._on_batch(len(rows))
        for job in batch:
            job.future.set_result(list(islice(results, len(job.rows))))
