"""HTTP routes for models, metrics and health, and what all routes that ask classifiers share."""

import asyncio
import time
from collections.abc import Collection, Coroutine, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Request, Response

from loraplex.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    LoraplexError,
    NotReadyError,
    UnknownClassifierError,
)
from loraplex.metrics import Metrics
from loraplex.routing.batch import classify_batch
from loraplex.routing.passes import SHORTEST_MS
from loraplex.routing.questions import trained, warned
from loraplex.routing.router import Router
from loraplex.server import logs
from loraplex.server.answers import visible_result
from loraplex.server.json_body import JsonRoute
from loraplex.server.lifecycle import Lifecycle, stopping
from loraplex.server.schemas import (
    ClassifyBody,
    FailedAdapter,
    ModelCard,
    ModelList,
    Readiness,
    TypeSafeModel,
    errors,
    result_json,
)
from loraplex.types import BatchResult, ClassifyRequest, ClassifyResult

if TYPE_CHECKING:  # the service imports torch
    from loraplex.service.service import Service

Result = TypeVar("Result")

router = APIRouter(route_class=JsonRoute)
INFERENCE_HEADER = "X-Amzn-SageMaker-Inference-Id"
MOST_ID = 128  # characters; AWS allows 64
SESSION_ID, RECORD = "loraplex.session_id", "loraplex.record"  # keys of a scope's state
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

ERRORS = errors(
    _404="no such classifier",
    _413="the body is too large, or the prompt is longer than the base takes and no contract cuts it",
    _429="the queue is full, or the key has too many requests in flight",
    _504="the deadline passed before anything was computed",
)


def router_of(request: Request) -> Router:
    """Return the app's router. Raises NotReadyError while the server loads."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    return lifecycle.router


def service_of(request: Request) -> "Service":
    """Return the router's service. Raises NotReadyError while the server loads."""
    return router_of(request).service


def metrics_of(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work`, and cancel it if the client disconnects; the engine's next step then drops what was queued. Raises
    CancelledError for a client that left, and NotReadyError if the drain timeout is over."""
    worker, has_left = asyncio.current_task(), False
    assert worker is not None

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        worker.cancel()

    # The work stays in this task: waiting for another task would cost two more rounds of the event loop.
    watching = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if has_left:
            worker.uncancel()
            raise CancelledError("the client left", remedy="none is needed") from None
        raise stopping() from None  # the drain timeout is over
    finally:
        watching.cancel()


async def answered(request: Request, *asked: ClassifyRequest, is_batch: bool = False) -> ClassifyResult | BatchResult:
    """Classify `asked` for as long as the client stays connected, and count the outcome in the metrics."""
    router, metrics = router_of(request), metrics_of(request)
    asked = _identified(request, asked)
    work = classify_batch(router, asked) if is_batch else router.classify(*asked)
    named = () if asked[0].classifiers == "*" else asked[0].classifiers
    try:
        result: ClassifyResult | BatchResult = await while_connected(request, work)
    except LoraplexError as exc:
        metrics.observe_failure(named, exc.code, len(asked[0].questions))
        raise
    # Count once the answer is on its way, so that the client does not wait; still before the loop's next request.
    asyncio.get_running_loop().call_soon(_observe, metrics, named, asked[0].questions, result)
    return result


def _identified(request: Request, asked: tuple[ClassifyRequest, ...]) -> tuple[ClassifyRequest, ...]:
    """Give each of `asked` the id that feedback may name, if the client sent one. The only conversation of a request
    may belong to a session."""
    record, state = logs.current(), request.scope.get("state", {})
    if record.given_id is not None and len(record.given_id) > MOST_ID:
        raise InvalidRequestError(
            f"{INFERENCE_HEADER} has {len(record.given_id)} characters", remedy=f"give {MOST_ID} at most"
        )
    given = record.given_id
    if given is not None and RECORD in state:
        given = f"{given}-{state[RECORD]}"
    if len(asked) > 1:
        if given is None:
            return asked
        return tuple(replace(one, request_id=f"{given}-{i}", key=record.key) for i, one in enumerate(asked))
    session = asked[0].conversation_id or (None if RECORD in state else state.get(SESSION_ID))
    if given is None and session == asked[0].conversation_id:
        return asked
    return (replace(asked[0], request_id=given, key=record.key, conversation_id=session),)


def _observe(
    metrics: Metrics, named: Iterable[str], questions: Collection[str], result: ClassifyResult | BatchResult
) -> None:
    for one in (result,) if isinstance(result, ClassifyResult) else result.results:
        if isinstance(one, ClassifyResult):
            metrics.observe(one, questions)
        else:
            metrics.observe_failure(named, one.error.code, len(questions))
            metrics.fail(one.error.code)


async def answer(request: Request, body: ClassifyBody) -> Response:
    """Answer Loraplex's own body. Adapters answer those questions that have their names."""
    asked: Seq[ClassifyRequest] = body.to_requests()
    warnings: Mapping[tuple[str, str], tuple[str, ...]] = {}
    if body.questions:
        started = time.monotonic()
        asked, warnings = await before_the_work(request, trained(router_of(request), asked), body.deadline_ms)
        left_ms = remaining_ms(body.deadline_ms, started)
        asked = [replace(one, deadline_ms=left_ms) for one in asked]
    result = visible_result(await answered(request, *asked, is_batch=body.inputs is not None))
    return Response(result_json(warned(result, warnings)), media_type="application/json")


async def before_the_work(request: Request, work: Coroutine[Any, Any, Result], deadline_ms: float | None) -> Result:
    """Await what comes before a classification, such as the loading of adapters: within the deadline, and for as long
    as the client stays connected. Raises DeadlineExceededError and CancelledError."""

    async def in_time() -> Result:
        async with asyncio.timeout(None if deadline_ms is None else deadline_ms / 1000):
            return await work

    try:
        return await while_connected(request, in_time())
    except TimeoutError:
        raise DeadlineExceededError(
            "the adapters were not loaded before the deadline", remedy="allow more time, or preload and pin them"
        ) from None


def remaining_ms(deadline_ms: float | None, started: float) -> float | None:
    """Return what is left of a deadline. One that has passed is left to the service to say so."""
    return None if deadline_ms is None else max(SHORTEST_MS, deadline_ms - (time.monotonic() - started) * 1000)


@router.get("/v1/models", tags=["adapters"])
async def models(request: Request) -> ModelList:
    """List the base under each of its names, then every route and every adapter."""
    service, created = service_of(request), request.app.state.created
    told = {name: "the base" for name in service.base_names}
    told |= {info.name: info.question or "a classifier" for info in service.adapters()}
    told |= {route.name: "a route" for route in router_of(request).routes()}
    names = (*(route.name for route in router_of(request).routes()), *(info.name for info in service.adapters()))
    cards = [ModelCard(id=name, created=created, parent=service.base_name) for name in dict.fromkeys(names)]
    cards = [*(ModelCard(id=name, created=created) for name in service.base_names), *cards]
    day = datetime.fromtimestamp(created, UTC).date().isoformat()
    models = [TypeSafeModel(name=card.id, description=told[card.id], release_date=day) for card in cards]
    return ModelList(data=cards, models=models)


@router.get("/v1/models/{name:path}", tags=["adapters"], responses=errors(_404="no such model"))
async def model(request: Request, name: str) -> ModelCard:
    """Return the base, a route or an adapter as a model."""
    service, created = service_of(request), request.app.state.created
    if router_of(request).knows(name):
        return ModelCard(id=name, created=created, parent=service.base_name)
    if name in service.base_names:
        return ModelCard(id=name, created=created)
    raise UnknownClassifierError(name, list(service.names()))


@router.get("/metrics", tags=["health"], response_model=None, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(metrics_of(request).render(), media_type=CONTENT_TYPE)


@router.head("/health", include_in_schema=False)
@router.get("/health", tags=["health"])
async def health(request: Request) -> dict[str, str]:
    """Answer 200 while the engine is alive or still loads. `keeps_inputs` says for how long texts are stored, if any
    are."""
    return {"status": "ok"} if request.app.state.lifecycle.phase == "loading" else _alive(request)


@router.head("/ready", include_in_schema=False)
@router.get("/ready", tags=["health"], response_model_exclude_none=True)
async def ready(request: Request) -> Readiness:
    """Answer 200 while requests are accepted: the base is loaded, the preloaded adapters are loaded or have failed, and
    the server is not stopping. `failed` names the adapters that cannot be used, if a key is sent or none is needed."""
    return _ready(request)


@router.head("/ping", include_in_schema=False)
@router.get("/ping", tags=["health"], response_model_exclude_none=True)
async def ping(request: Request) -> Readiness:
    """Answer SageMaker's health check, as /ready does."""
    return _ready(request)


def _ready(request: Request) -> Readiness:
    request.app.state.lifecycle.check_ready()
    _alive(request)
    failed, record = service_of(request).failed(), logs.current()
    keeps_inputs = router_of(request).keeps_inputs
    if not record.is_trusted and record.key is None:
        return Readiness(num_failed=len(failed), keeps_inputs=keeps_inputs)
    named = [FailedAdapter(name=name, code=code) for name, code in failed.items()]
    return Readiness(num_failed=len(failed), failed=named, keeps_inputs=keeps_inputs)


def _alive(request: Request) -> dict[str, str]:
    if not service_of(request).alive:
        raise NotReadyError(
            "the engine is not running", remedy="see the server's log; restart the server if this persists"
        )
    keeps_inputs = router_of(request).keeps_inputs
    return {"status": "ok"} if keeps_inputs is None else {"status": "ok", "keeps_inputs": keeps_inputs}
