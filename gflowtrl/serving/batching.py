"""One thread that owns the model, and the queue before it.

Requests of equal settings that wait together are decoded together: a decoding of 20 histories costs little more than
one of a single history. The thread knows neither HTTP nor recommenders.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from .limits import Limits


logger = logging.getLogger(__name__)


class Unavailable(RuntimeError):
    """The queue is full, or the server is shutting down."""


class Failed(RuntimeError):
    """The work raised an exception, which is its cause, and which the log holds."""


@dataclass(eq=False)
class Job:
    """Work for the model.

    Attributes:
        work: rows in, one result for each out.
        rows: those of this job.
        key: jobs of equal keys may be done in one call of `work`; None: never with another one.
        future: gets the results of the rows.
    """

    work: Callable[[list[Any]], list[Any]]
    rows: list[Any]
    key: Hashable | None
    future: Future = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)


class Worker:
    """Does jobs one batch after the other, the oldest first, each with the later ones that can join it.

    Args:
        limits: `max_batch`, `max_wait_ms` and `max_queue` count here.
        on_batch: told the number of rows of every batch that was done.
    """

    def __init__(self, limits: Limits, on_batch: Callable[[int], None]):
        self._limits, self._on_batch = limits, on_batch
        self._queue: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = True

    def start(self) -> None:
        """Begin to work; a worker that was stopped can be started again."""
        self._stopping = False
        # A daemon, so that a second Ctrl-C ends the process even where a decoding hangs.
        self._thread = threading.Thread(target=self._run, name="gflowtrl-model", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more jobs, finish those that are queued, and return when all is done; after `start` only."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def ready(self) -> bool:
        return not self._stopping and self._thread.is_alive()

    @property
    def queue_length(self) -> int:
        return len(self._queue)

    def submit(self, job: Job) -> Future:
        """Queue a job; its future gets the results of its rows, or the exception `Failed`.

        Raises:
            Unavailable: the queue is full, or the worker is not running.
        """
        with self._changed:
            if self._stopping:
                raise Unavailable("The server is shutting down; ask another one, or later.")
            if len(self._queue) >= self._limits.max_queue:  # those that nobody waits for any more make room
                self._queue = [waiting for waiting in self._queue if not waiting.future.canceled()]
            if len(self._queue) >= self._limits.max_queue:
                raise Unavailable(f"{len(self._queue)} requests are waiting, as many as this server takes; ask later.")
            self._queue.append(job)
            self._changed.notify_all()
        return job.future

    # -------------------------------------------------------------------------------------------------- in the thread
    def _run(self) -> None:
        while (batch := self._next()) is not None:
            batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if batch:
                self._do(batch)

    def _next(self) -> list[Job] | None:
        """The next batch, taken out of the queue; None when the worker is to stop and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            if not self._queue:
                return None
            first = self._queue[0]
            left = first.queued_at + self._limits.max_wait_ms / 1000 - time.monotonic()
            self._changed.wait_for(lambda: self._stopping or self._joining(first)[1], left)
            batch, _ = self._joining(first)
            self._queue = [job for job in self._queue if job not in batch]
            return batch

    def _joining(self, first: Job) -> tuple[list[Job], bool]:
        """The jobs that can be done with the first one, itself included, and whether waiting for more is of no use."""
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
        rows = [row for job in batch for row in job.rows]
        try:
            results = iter(batch[0].work(rows))
        except Exception as error:
            if len(batch) > 1:  # what is wrong with one request must not spoil the others
                for job in batch:
                    self._do([job])
                return
            logger.exception("A request of %d rows could not be answered.", len(rows))
            failed = Failed(type(error).__name__)
            failed.__cause__ = error
            batch[0].future.set_exception(failed)
            return
        self._on_batch(len(rows))
        for job in batch:
            job.future.set_result(list(islice(results, len(job.rows))))
