"""The native routes: /v1/classify, /v1/models and health."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from loraplex.backends.base import Backend
from loraplex.errors import CancelledError, LoraplexError, NotReadyError
from loraplex.metrics import Metrics
from loraplex.server.schemas import ClassifyBody, ErrorBody, ModelCard, ModelList, result_json
from loraplex.types import ClassifyRequest, ClassifyResult

Result = TypeVar("Result")

router = APIRouter()
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the body is not JSON in UTF-8"},
    404: {"model": ErrorBody, "description": "no such classifier"},
    413: {
        "model": ErrorBody,
        "description": "the body is too large, or the prompt longer than the base takes and no contract cuts it",
    },
    422: {"model": ErrorBody, "description": "no JSON object, or a field missing, unknown, of the wrong type or empty"},
    429: {"model": ErrorBody, "description": "the queue is full"},
    503: {"model": ErrorBody, "description": "not ready, or stopping"},
    504: {"model": ErrorBody, "description": "nothing was computed before the deadline"},
}


def backend_of(request: Request) -> Backend:
    backend: Backend = request.app.state.backend
    return backend


def metrics_of(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


def stopping() -> NotReadyError:
    return NotReadyError("the server is stopping", remedy="send it to another server, or again when it is back")


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`, or cancel it when the client leaves: what it queued is dropped at the engine's next step."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the time to drain is over
            raise stopping() from None
        if not task.done():
            raise CancelledError("the client left", remedy="none is needed")
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


async def answered(request: Request, asked: ClassifyRequest) -> ClassifyResult:
    """By the backend, for as long as the client stays; counted."""
    try:
        result = await while_connected(request, backend_of(request).classify(asked))
    except LoraplexError as exc:
        metrics_of(request).observe_failure(() if asked.classifiers == "*" else asked.classifiers, exc.code)
        raise
    metrics_of(request).observe(result)
    return result


@router.post("/v1/classify", response_model=ClassifyResult, responses=ERRORS, tags=["classify"])
async def classify(request: Request, body: ClassifyBody) -> Response:
    """Judge one conversation by any number of classifiers, in one forward pass where they fit."""
    return Response(result_json(await answered(request, body.to_request())), media_type="application/json")


@router.get("/v1/models", tags=["adapters"])
async def models(request: Request) -> ModelList:
    """The base, then every adapter."""
    backend, created = backend_of(request), request.app.state.created
    cards = [ModelCard(id=backend.base_name, created=created)]
    cards += [ModelCard(id=info.name, created=created, parent=backend.base_name) for info in backend.adapters()]
    return ModelList(data=cards)


@router.get("/metrics", tags=["health"], response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(metrics_of(request).render(), media_type=CONTENT_TYPE)


@router.head("/health", include_in_schema=False)
@router.get("/health", tags=["health"], responses={503: {"model": ErrorBody}})
async def health(request: Request) -> dict[str, str]:
    """200 while the engine lives."""
    return _alive(request)


@router.head("/ready", include_in_schema=False)
@router.get("/ready", tags=["health"], responses={503: {"model": ErrorBody}})
async def ready(request: Request) -> dict[str, str]:
    """200 when requests are answered: the base and all adapters are loaded."""
    return _alive(request)


@router.head("/ping", include_in_schema=False)
@router.get("/ping", tags=["health"], responses={503: {"model": ErrorBody}})
async def ping(request: Request) -> dict[str, str]:
    """SageMaker's health check: as /ready."""
    return _alive(request)


def _alive(request: Request) -> dict[str, str]:
    if not backend_of(request).alive:
        raise NotReadyError("the engine does not run", remedy="see the server's log; restart it if this stays")
    return {"status": "ok"}
