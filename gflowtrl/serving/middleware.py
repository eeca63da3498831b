"""ASGI middleware that measures requests, limits the size of their bodies and answers unexpected exceptions."""

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
    """Measure each request, limit the size of its body, and answer with 500 if the application raises an exception.

    Args:
        app: the ASGI application.
        metrics: receives path, status and seconds of each request.
        paths: paths that are counted by name. All others are counted as "other", so clients cannot create new series.
        max_body_bytes: longest body; longer ones are answered with 413.
    """

    def __init__(self, app: Callable, metrics: Metrics, paths: Collection[str], max_body_bytes: int):
        self.app, self.metrics, self.paths, self.max_body_bytes = app, metrics, paths, max_body_bytes

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def send_and_record(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, self._limited(receive), send_and_record)
        except Exception:
            logger.exception("%s %s could not be answered.", scope["method"], scope["path"])
            if not status:
                text = "The request could not be answered because of an error in the server; see its log."
                await JSONResponse({"detail": text}, 500)(scope, receive, send_and_record)
        finally:
            if status:  # 0: the client has disconnected
                path = getattr(scope.get("route"), "path", None)
                path = path if path in self.paths else "other"
                self.metrics.count_request(path, status, time.perf_counter() - start)

    def _limited(self, receive: Receive) -> Receive:
        """Wrap `receive` so that a body of more than `max_body_bytes` raises a 413."""
        size = 0

        async def limited() -> dict[str, Any]:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size <= self.max_body_bytes:
                return message
            # Closing a connection with unread data would lose the answer, so more of the body is read, up to a limit.
            while message.get("more_body") and size < 16 * self.max_body_bytes:
                message = await receive()
                size += len(message.get("body", b""))
            raise HTTPException(413, f"The body has more than {self.max_body_bytes} bytes; send several requests.")

        return limited
