"""The HTTP interface: check a request, hand it to the worker, put the result into words."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import JSONResponse

import gflowtrl
from gflowtrl.finite import NonFiniteError
from gflowtrl.recommender import Recommender

from . import request_checks
from .batching import Failed, Job, Unavailable, Worker
from .limits import Limits
from .messages import ExplainAnswer, ExplainRequest, Health, Problem, RecommendAnswer, RecommendRequest, format_error
from .metrics import CONTENT_TYPE, Metrics
from .middleware import RequestMiddleware


MODELS = {"/recommend": RecommendRequest, "/explain": ExplainRequest}
PATHS = (*MODELS, "/health", "/metrics")
RETRY_AFTER = {"Retry-After": "1"}  # seconds; a full queue is mostly gone by then
PROBLEMS = {status: {"model": Problem} for status in (400, 413, 422, 500, 503, 504)}


@asynccontextmanager
async def _at_work(recommender: Recommender, worker: Worker, problems: list[str], _: FastAPI) -> AsyncIterator[None]:
    """From startup to shutdown: the model is tried once, and the worker runs."""
    problems[:] = await asyncio.to_thread(_problems_of, recommender)
    worker.start()
    yield
    await asyncio.to_thread(worker.stop)


def create_app(recommender: Recommender, limits: Limits | None = None) -> FastAPI:
    """An application that answers with `recommender`; the routes are described in docs/serving.md.

    The model is used by one thread, from the application's startup to its shutdown, which answers what is queued.

    Args:
        recommender: nothing else may use it meanwhile.
        limits: by default `Limits()`.

    Example:
        ```python
        app = create_app(Recommender.from_pretrained("outputs/gflownet"))
        uvicorn.run(app, host="127.0.0.1", port=8000)
        ```
    """
    limits = Limits() if limits is None else limits
    metrics = Metrics()
    worker = Worker(limits, metrics.count_batch)

    problems: list[str] = []  # of the last answer: what is wrong with the model

    lifespan = partial(_at_work, recommender, worker, problems)
    app = FastAPI(title="gflowtrl", version=gflowtrl.__version__, lifespan=lifespan)
    app.add_middleware(RequestMiddleware, metrics=metrics, paths=PATHS, max_body_bytes=limits.max_body_bytes)
    _add_error_handlers(app)
    ask = partial(_ask, worker, limits, problems)

    @app.post("/recommend", responses=PROBLEMS)
    async def recommend(asked: RecommendRequest) -> RecommendAnswer:
        """The items that come next, for each history."""
        request_checks.check_limits(asked, limits)
        request_checks.check_allowed(asked.allowed_items, recommender.catalog)
        histories, warnings = request_checks.known_items(asked.histories, recommender)
        work = partial(recommender.recommend, **asked.model_dump(exclude={"histories"}))
        found = await ask(work, histories, batch_key(asked, histories))
        return RecommendAnswer(recommendations=found, warnings=warnings)

    @app.post("/explain", responses=PROBLEMS)
    async def explain(asked: ExplainRequest) -> ExplainAnswer:
        """Why an item is where it is in the list of a history."""
        history, warnings = request_checks.known_to_explain(asked, limits, recommender.catalog)
        (found,) = await ask(lambda rows: [recommender.explain(*row) for row in rows], [(history, asked.item)], None)
        return ExplainAnswer(**vars(found), probability=math.exp(found.log_prob), warnings=warnings)

    @app.get("/health", responses={503: {"model": Health}}, response_model_exclude_none=True)
    async def health(response: Response) -> Health:
        """Whether requests are answered: 200, or 503 before the start, during the shutdown, and where the model
        computes NaN."""
        ready = worker.ready and not problems
        response.status_code = 200 if ready else 503
        name, items, problem = recommender.model.name_or_path, len(recommender.catalog), next(iter(problems), None)
        return Health(ready=ready, model=name, items=items, version=gflowtrl.__version__, problem=problem)

    @app.get("/metrics")
    async def numbers() -> Response:
        """Counters and histograms in Prometheus' text format."""
        return Response(metrics.text(worker.queue_length), media_type=CONTENT_TYPE)

    return app


def batch_key(asked: RecommendRequest, histories: Sequence[Sequence[Any]]) -> Hashable | None:
    """Requests of equal keys may be decoded together, as this changes the answer of none; None: alone.

    A sampled list draws by its place in the call of `Recommender.recommend`, so that other requests would shift it.
    With `exclude_seen` the beam grows by the longest history of the call, so that requests go together where their own
    would grow alike.
    """
    if asked.strategy == "sample" or asked.allowed_items is not None:
        return None
    return asked.k, max(len(set(history)) for history in histories) if asked.exclude_seen else None


def _problems_of(recommender: Recommender) -> list[str]:
    """What is wrong with the model before the first request."""
    try:
        recommender.check()
    except NonFiniteError as error:
        return [str(error)]
    return []


async def _ask(
    worker: Worker, limits: Limits, problems: list[str], work: Callable[[list[Any]], list[Any]], rows: list[Any],
    key: Hashable | None,
) -> list[Any]:  # fmt: skip
    """What `work` makes of the rows, in the worker's time; `problems` become those of the last answer."""
    try:
        future = worker.submit(Job(work, rows, key))
        found = await asyncio.wait_for(asyncio.wrap_future(future), limits.timeout_s)
        problems.clear()
        return found
    except Unavailable as error:
        raise HTTPException(503, str(error), RETRY_AFTER) from None
    except TimeoutError:
        text = f"The request was not answered within {limits.timeout_s:g} seconds; ask later, or for less."
        raise HTTPException(504, text) from None
    except Failed as error:
        if isinstance(error.__cause__, NonFiniteError):
            problems[:] = [str(error.__cause__)]
            raise HTTPException(503, problems[0]) from None
        text = f"The request could not be answered because of a fault in the server ({error}); see its log."
        raise HTTPException(500, text) from None


def _add_error_handlers(app: FastAPI) -> None:
    """Every error is `{"detail": sentence}`."""

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        status = 400 if first["type"] == "json_invalid" else 422
        return JSONResponse({"detail": format_error(MODELS[request.scope["route"].path], first)}, status)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        posted, got = ", ".join(MODELS), ", ".join(PATHS[len(MODELS) :])
        allowed = (error.headers or {}).get("Allow", "")
        texts = {  # of FastAPI's own refusals; 400 is a body that breaks JSON's reader: not UTF-8, nested too deeply
            400: "The body cannot be read as JSON; send a JSON object in UTF-8.",
            404: f"There is nothing at this path; use POST {posted} or GET {got}.",
            405: f"This path does not answer to {request.method}; use {allowed}.",
        }
        text = texts.get(error.status_code, error.detail)
        return JSONResponse({"detail": text}, error.status_code, headers=error.headers)
