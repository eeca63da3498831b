"""Limits of a server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from gflowtrl.checks import COUNT, NOT_NEGATIVE, POSITIVE, check_number


@dataclass(frozen=True)
class Limits:
    """Limits of a server, so that no client can overload it.

    Args:
        max_batch: number of histories that are decoded together. A request is never split: one with more histories is
            decoded alone.
        max_wait_ms: milliseconds that a request waits for others to join its batch while the model is idle.
        max_queue: number of requests that may wait for the model. The next one is answered with 503.
        max_k: greatest `k` of a request. It also bounds the beam width.
        max_histories: number of histories per request.
        max_history_items: number of items per history. The prompt has only the last ones, but with `exclude_seen`
            all of them are left out of the answer.
        max_body_bytes: bytes per request body.
        body_timeout_s: seconds after which a request whose body has not arrived is answered with 408.
        timeout_s: seconds after which a waiting request is answered with 504.
        grace_s: seconds from Ctrl-C or SIGTERM to the end of the process. Four fifths of them are for the requests
            that were accepted before.
        max_catalog_items: items per change of the catalog.
        max_catalog_bytes: bytes per body of a change, of clients with the token.

    Raises:
        ValueError: a limit is below 1 (`max_wait_ms`: below 0; the other seconds: not above 0).
    """

    max_batch: int = 64
    max_wait_ms: float = 2.0
    max_queue: int = 256
    max_k: int = 100
    max_histories: int = 64
    max_history_items: int = 500
    max_body_bytes: int = 1_000_000
    body_timeout_s: float = 10.0
    timeout_s: float = 30.0
    grace_s: float = 25.0
    max_catalog_items: int = 10_000
    max_catalog_bytes: int = 32_000_000

    def __post_init__(self):
        bounds = {"max_wait_ms": NOT_NEGATIVE, "body_timeout_s": POSITIVE, "timeout_s": POSITIVE, "grace_s": POSITIVE}
        for field in fields(self):
            check_number(field.name, getattr(self, field.name), bounds.get(field.name, COUNT))
