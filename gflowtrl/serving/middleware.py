"""What every request passes: it is measured, its body is bounded, and nothing it causes stays unanswered."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from .metrics import Metrics


logger = logging.getLogger(__name__)
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class RequestMiddleware:
    """ASGI middleware.

    Args:
        app: what is behind it.
        metrics: gets path, status and seconds of each request.
        paths: of the routes that are counted under their own name; others are counted as "other", so that clients
            cannot make new series.
        max_body_bytes: of a longer body is said that it is too long.
    """

    def __init__(self, app: Callable, metrics: Metrics, paths: Collection[str], max_body_bytes: int):
        self.app, self.metrics, self.paths, self.max_body_bytes = app, metrics, paths, max_body_bytes

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def noting(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, self._bounded(receive), noting)
        except Exception:
            logger.exception("%s %s could not be answered.", scope["method"], scope["path"])
            if not status:
                text = "The request could not be answered because of a fault in the server; see its log."
                await JSONResponse({"detail": text}, 500)(scope, receive, noting)
        finally:
            if status:  # else the client went away
                path = getattr(scope.get("route"), "path", None)
                path = path if path in self.paths else "other"
                self.metrics.count_request(path, status, time.perf_counter() - start)

    def _bounded(self, receive: Receive) -> Receive:
        size = 0

        async def bounded() -> dict[str, Any]:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size <= self.max_body_bytes:
                return message
            # A connection that is closed with unread data in it loses the answer: read on, within bounds.
            while message.get("more_body") and size < 16 * self.max_body_bytes:
                message = await receive()
                size += len(message.get("body", b""))
            raise HTTPException(413, f"The body has more than {self.max_body_bytes} bytes; ask in several requests.")

        return bounded
