"""`POST /catalog`: the items of a running server change, and no request is lost.

A thread plans the change while the model's thread goes on answering. The model's thread then tries the new recommender
between two batches, and from then on new requests use it. Requests that arrived before keep the old one.
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from gflowtrl.catalog import Item
from gflowtrl.catalog_change import CatalogChange, CatalogConflict
from gflowtrl.finite import NonFiniteError
from gflowtrl.recommender import Recommender

from .batching import Job, Unavailable, Worker
from .limits import Limits
from .messages import CatalogAnswer, CatalogRequest, repr_json


PATH = "/catalog"
LEAST_CHARACTERS = 16  # of a token


class TokenCheck:
    """Check the bearer token of requests to `/catalog`, in constant time.

    Args:
        token: the secret.

    Raises:
        ValueError: it is shorter than 16 characters, or has other characters than printable ASCII without spaces.
    """

    def __init__(self, token: str):
        if len(token) < LEAST_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError(
                f"The catalog token must have at least {LEAST_CHARACTERS} printable ASCII characters without spaces; "
                f"make one with: openssl rand -hex 32"
            )
        self._digest = sha256(token.encode()).digest()

    def check(self, request: Request) -> None:
        """Raise a 401 for a request without a token, and a 403 for a wrong one."""
        if (problem := self._problem(request.headers)) is not None:
            raise problem

    def allows(self, scope: Scope) -> bool:
        """Return whether a request has the token."""
        return self._problem(Headers(scope=scope)) is None

    def _problem(self, headers: Mapping[str, str]) -> HTTPException | None:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            text = "This path needs the catalog token; send it in the header Authorization: Bearer TOKEN."
            return HTTPException(401, text, {"WWW-Authenticate": "Bearer"})
        if not hmac.compare_digest(sha256(given.strip().encode()).digest(), self._digest):
            return HTTPException(403, "The catalog token is wrong; send the one that the server was started with.")
        return None


class LivingCatalog:
    """The recommender that answers new requests, and its changes, one at a time.

    Args:
        recommender: the first recommender.
        worker: the model's thread.
        on_swap: called after each change.

    Attributes:
        recommender: changes between two turns of the event loop. A request reads it once.
    """

    def __init__(self, recommender: Recommender, worker: Worker, on_swap: Callable[[], None]):
        self.recommender, self._worker, self._on_swap = recommender, worker, on_swap
        self._changing: asyncio.Task | None = None

    async def change(self, body: CatalogRequest, limits: Limits) -> CatalogAnswer:
        """Make a change. It is completed even if the client hangs up.

        Raises:
            HTTPException: 409, another change is being made, or this one does not fit the catalog; 413, it has too
                many items; 422, an item is invalid; 503, the server is stopping or its queue is full.
        """
        if (number := len(body.add) + len(body.retire)) > limits.max_catalog_items:
            text = f"The change has {number} items, but this server allows at most {limits.max_catalog_items}"
            raise HTTPException(413, f"{text}; send several requests.")
        add: dict[Item, dict[str, Any]] = {}
        for entry in body.add:
            if entry.item in add:
                raise HTTPException(422, f"add has the item {repr_json(entry.item)} twice; send it once.")
            add[entry.item] = entry.model_dump(exclude={"item"}, exclude_none=True)
        if self._changing is not None and not self._changing.done():
            text = "Another change of the catalog is being made. Try again after its answer."
            raise HTTPException(409, text, {"Retry-After": "5"})
        self._changing = asyncio.ensure_future(self._change(add, body.retire))
        asyncio.gather(self._changing, return_exceptions=True)  # reads its exception, if the client has hung up
        return await asyncio.shield(self._changing)

    async def _change(self, add: dict[Item, dict[str, Any]], retire: list[Item]) -> CatalogAnswer:
        start, old, found = time.perf_counter(), self.recommender, []

        def activate(_: list[Any]) -> list[Any]:
            new = old.with_change(change)
            try:
                new.recommend([new.catalog.items[:1]], k=1)  # a catalog that cannot be decoded is never used
            except BaseException:
                old.discard_change()
                raise
            found.append(new)
            return []

        try:
            change = await asyncio.to_thread(_plan, old, add, retire)
            await asyncio.wrap_future(self._worker.submit(Job(activate, [], None)))
        except CatalogConflict as error:
            raise HTTPException(409, str(error)) from None
        except (Unavailable, NonFiniteError) as error:
            raise HTTPException(503, str(error)) from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        self.recommender = found[0]
        self._on_swap()
        if gc.get_freeze_count():  # by `serve`; the old catalog is in no cycle, so it does not need a collection
            gc.freeze()
        return CatalogAnswer(**change.report.as_dict(), seconds=time.perf_counter() - start)


def _plan(recommender: Recommender, add: dict[Item, dict[str, Any]], retire: list[Item]) -> CatalogChange:
    change = recommender.plan_change(add, retire)
    change.parts.catalog.to(recommender.model.device)
    return change
