"""ASGI middleware: bodies are limited in size and time, clients that hang up are noticed, every failure is JSON."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import Limits
from .metrics import Metrics


logger = logging.getLogger(__name__)
CLOSE = (b"connection", b"close")


class RequestMiddleware:
    """Read the body, run the application until it has answered or the client has hung up, and count the answer.

    An exception of the application is answered with 500. If a stopping server cancels a request, it is answered with
    503. The answers of a stopping server close their connections.

    Args:
        app: the ASGI application.
        limits: `max_body_bytes`, `max_catalog_bytes` and `body_timeout_s` are used.
        metrics: count path, status and seconds of each answer.
        larger: whether a request may have `max_catalog_bytes` instead.
        paths: paths that are counted by name. All others are counted as "other", so clients cannot create new series.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        paths: Collection[str],
        larger: Callable[[Scope], bool] = lambda scope: False,
    ):
        self.app, self.limits, self.metrics, self.paths, self.larger = app, limits, metrics, paths, larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state, start, status, refusal = scope["app"].state, time.perf_counter(), 0, None

        async def send_and_record(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if state.stopping and "headers" in message:
                message = {**message, "headers": [*message["headers"], CLOSE]}
            await send(message)

        try:
            await self._answer(scope, receive, send_and_record)
        except HTTPException as error:
            refusal = JSONResponse({"detail": error.detail}, error.status_code, error.headers)
        except asyncio.CancelledError:
            if not state.stopping:
                raise
            refusal = JSONResponse({"detail": "The server stopped before it could answer. Try again later."}, 503)
        except Exception as error:
            logger.exception("%s %s could not be answered.", scope["method"], scope["path"])
            text = f"an error in the server ({type(error).__name__}); see its log."
            refusal = JSONResponse({"detail": f"The request could not be answered because of {text}"}, 500)
        if refusal and not status:
            await refusal(scope, receive, send_and_record)
        if status:  # 0: the client has hung up
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            path = path if path in self.paths else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application until it has answered. If the client hangs up before that, cancel it."""
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                messages = [{"type": "http.request", "body": await self._body(scope, receive)}]
        except TimeoutError:
            text = f"The body did not arrive within {self.limits.body_timeout_s:g} seconds; send it faster."
            raise HTTPException(408, text, {"Connection": "close"}) from None
        except ClientDisconnect:
            return
        leaving = asyncio.ensure_future(receive())  # the next message is that the client has hung up

        async def received() -> Message:
            return messages.pop() if messages else await asyncio.shield(leaving)

        answering = asyncio.ensure_future(self.app(scope, received, send))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()  # raises the exception of the application
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Return the body of a request. One that is too long raises a 413."""
        limit = self.limits.max_catalog_bytes if self.larger(scope) else self.limits.max_body_bytes
        body, size = b"", 0
        async for chunk in Request(scope, receive).stream():
            size += len(chunk)
            body += chunk if size <= limit else b""
            if size > 16 * limit:  # before that it is read, because closing with unread data would lose the answer
                break
        if size > limit:
            raise HTTPException(413, f"The body has more than {limit} bytes; send several requests.")
        return body
