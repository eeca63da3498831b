"""What a server takes on, so that no client can take it down."""

from __future__ import annotations

from dataclasses import dataclass, fields

from gflowtrl.checks import COUNT, NOT_NEGATIVE, POSITIVE, check_number


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Args:
        max_batch: histories that are decoded together. A request is never split: one that has more is decoded alone.
        max_wait_ms: milliseconds that a request waits for others to be decoded with while the model is idle.
        max_queue: requests that wait for the model; the next one is answered with 503.
        max_k: longest list that may be asked for; also bounds the beam.
        max_histories: histories of a request.
        max_history_items: items of a history. Only the last ones are read, but with `exclude_seen` the beam grows by
            all of them.
        max_body_bytes: bytes of a request's body.
        timeout_s: seconds after which a request that is not answered yet is answered with 504.

    Raises:
        ValueError: a limit below 1 (`max_wait_ms`: below 0; `timeout_s`: not above 0).
    """

    max_batch: int = 64
    max_wait_ms: float = 2.0
    max_queue: int = 256
    max_k: int = 100
    max_histories: int = 64
    max_history_items: int = 500
    max_body_bytes: int = 1_000_000
    timeout_s: float = 30.0

    def __post_init__(self):
        bounds = {"max_wait_ms": NOT_NEGATIVE, "timeout_s": POSITIVE}
        for field in fields(self):
            check_number(field.name, getattr(self, field.name), bounds.get(field.name, COUNT))
