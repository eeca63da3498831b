"""The HTTP interface: checks a request, passes it to the worker, and formats the result."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import gflowtrl
from gflowtrl.finite import NonFiniteError
from gflowtrl.recommender import Recommender

from . import request_checks
from .batching import STOPPING, Job, Unavailable, Worker
from .catalog import PATH, LivingCatalog, TokenCheck
from .limits import Limits
from .messages import (
    CatalogAnswer,
    CatalogRequest,
    ExplainAnswer,
    ExplainRequest,
    Health,
    Problem,
    RecommendAnswer,
    RecommendRequest,
    format_error,
)
from .metrics import Metrics
from .middleware import RequestMiddleware


MODELS = {"/recommend": RecommendRequest, "/explain": ExplainRequest}
PATHS = (*MODELS, "/health", "/metrics")
RETRY_AFTER = {"Retry-After": "1"}  # seconds in which most of a full queue is answered
PROBLEMS = {status: {"model": Problem} for status in (400, 408, 413, 422, 500, 503, 504)}
CATALOG_PROBLEMS = PROBLEMS | {status: {"model": Problem} for status in (401, 403, 409)}


@asynccontextmanager
async def _lifespan(served: LivingCatalog, worker: Worker, app: FastAPI) -> AsyncIterator[None]:
    """Check the model once at startup, and run the worker until shutdown."""
    app.state.stopping, app.state.model_problem = False, None
    try:
        await asyncio.to_thread(served.recommender.check)
    except NonFiniteError as error:
        app.state.model_problem = str(error)
    worker.start()
    yield
    app.state.stopping = True
    await asyncio.to_thread(worker.stop)


def create_app(recommender: Recommender, limits: Limits | None = None, catalog_token: str | None = None) -> FastAPI:
    """Return an application that serves `recommender`. docs/serving.md describes the routes.

    One thread uses the model, from the application's startup to its shutdown. At shutdown it first answers the
    requests in the queue. `app.state.stopping = True` announces the shutdown: requests are still answered, but
    `/health` says so, and every answer closes its connection.

    Args:
        recommender: the recommender. Nothing else may use it at the same time.
        limits: by default `Limits()`.
        catalog_token: the secret of clients that may change the catalog (`POST /catalog`); None: nobody may.

    Raises:
        ValueError: the token is too short.

    Example:
        ```python
        app = create_app(Recommender.from_pretrained("outputs/gflownet"))
        uvicorn.run(app, host="127.0.0.1", port=8000)
        ```
    """
    limits = Limits() if limits is None else limits
    metrics = Metrics()
    worker = Worker(limits, metrics.batches.observe)
    metrics.queue.set_function(lambda: worker.queue_length)
    served, name = LivingCatalog(recommender, worker, metrics.swaps.inc), recommender.model.name_or_path
    token = None if catalog_token is None else TokenCheck(catalog_token)

    lifespan = partial(_lifespan, served, worker)
    app = FastAPI(title="gflowtrl", version=gflowtrl.__version__, lifespan=lifespan)
    app.state.stopping = False
    app.state.model_problem = None  # what was wrong with the model at its last use
    paths = PATHS if token is None else (*PATHS, PATH)
    larger = (lambda scope: False) if token is None else token.allows
    app.add_middleware(RequestMiddleware, limits=limits, metrics=metrics, paths=paths, larger=larger)
    _add_error_handlers(app)
    run = partial(_run, app, worker, limits)

    @app.post("/recommend", responses=PROBLEMS)
    async def recommend(body: RecommendRequest) -> RecommendAnswer:
        """Recommend items for each history."""
        recommender = served.recommender  # this request keeps it, if the catalog changes now
        request_checks.check_recommend(body, limits, recommender.catalog)
        histories, warnings = request_checks.known_items(body.histories, recommender)
        work, key = partial(recommender.recommend, **body.model_dump(exclude={"histories"})), batch_key(body)
        key = key and (recommender.catalog.version, key)
        return RecommendAnswer(recommendations=await run(work, histories, key), warnings=warnings)

    @app.post("/explain", responses=PROBLEMS)
    async def explain(body: ExplainRequest) -> ExplainAnswer:
        """Explain the position of an item in the list of a history."""
        recommender = served.recommender
        history, warnings = request_checks.check_explain(body, limits, recommender.catalog)
        work = [(history, body.item)]
        (explanation,) = await run(lambda rows: [recommender.explain(*row) for row in rows], work, None)
        return ExplainAnswer(**vars(explanation), probability=math.exp(explanation.log_prob), warnings=warnings)

    @app.get("/health", responses={503: {"model": Health}}, response_model_exclude_none=True)
    async def health(response: Response) -> Health:
        """Return 200, or 503 with the problem: startup, shutdown, NaN, or the end of the model's thread."""
        problem = worker.problem or (STOPPING if app.state.stopping else app.state.model_problem)
        response.status_code = 503 if problem else 200
        catalog = served.recommender.catalog
        return Health(
            ready=problem is None,
            model=name,
            items=len(catalog),
            catalog_version=catalog.version,
            version=gflowtrl.__version__,
            problem=problem,
        )

    @app.get("/metrics")
    async def get_metrics() -> Response:
        """Return counters and histograms in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    if token is not None:

        @app.post(PATH, responses=CATALOG_PROBLEMS, dependencies=[Depends(token.check)])
        async def change_catalog(body: CatalogRequest) -> CatalogAnswer:
            """Add items to the catalog, and retire items."""
            return await served.change(body, limits)

    return app


def batch_key(body: RecommendRequest) -> Hashable | None:
    """Return the key of a request. Requests with equal keys may be decoded together without a change to any answer.

    None: the request is decoded alone. A sampled list depends on its index in the call of `Recommender.recommend`,
    which other requests would shift.
    """
    if body.strategy == "sample" or body.allowed_items is not None:
        return None
    return body.k, body.exclude_seen


async def _run(
    app: FastAPI, worker: Worker, limits: Limits, work: Callable[[list[Any]], list[Any]], rows: list[Any],
    key: Hashable | None,
) -> list[Any]:  # fmt: skip
    """Return the results of `work` for the rows, computed by the worker. If this is canceled, the job is, too."""
    try:
        future = worker.submit(Job(work, rows, key))
        results = await asyncio.wait_for(asyncio.wrap_future(future), limits.timeout_s)
        app.state.model_problem = None
        return results
    except Unavailable as error:
        raise HTTPException(503, str(error), RETRY_AFTER) from None
    except TimeoutError:
        text = f"The request was not answered within {limits.timeout_s:g} seconds. Try again later, or ask for less."
        raise HTTPException(504, text) from None
    except NonFiniteError as error:
        app.state.model_problem = str(error)
        raise HTTPException(503, app.state.model_problem) from None


def _add_error_handlers(app: FastAPI) -> None:
    """Return every error as `{"detail": sentence}`."""

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        status = 400 if first["type"] == "json_invalid" else 422
        model = {**MODELS, PATH: CatalogRequest}[request.scope["route"].path]
        return JSONResponse({"detail": format_error(model, first)}, status)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> Response:
        post, get = ", ".join(MODELS), ", ".join(PATHS[len(MODELS) :])
        allowed = (error.headers or {}).get("Allow", "")
        texts = {  # instead of FastAPI's own texts; 400: a body that json cannot read (not UTF-8, nested too deeply)
            400: "The body cannot be read as JSON; send a JSON object in UTF-8.",
            404: f"There is nothing at this path; use POST {post} or GET {get}.",
            405: f"This path does not support {request.method}; use {allowed}.",
        }
        text = texts.get(error.status_code, error.detail)
        return JSONResponse({"detail": text}, error.status_code, headers=error.headers)
