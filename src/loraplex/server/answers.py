"""Turns errors into HTTP answers. No other module does."""

import asyncio
import logging
import math
import traceback
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex.errors import (
    BadInputError,
    BodyTooLargeError,
    ConfigurationError,
    EngineError,
    InvalidRequestError,
    LoraplexError,
    MethodNotAllowedError,
    OverloadedError,
    RequestTimeoutError,
    StateError,
)
from loraplex.exhaustion import exhaustion
from loraplex.problems import find_problem, refused
from loraplex.server import logs
from loraplex.server.encodings import ACCEPTED
from loraplex.server.json_body import OBJECT
from loraplex.server.lifecycle import PROBES, REFUSAL, stopping
from loraplex.server.proxies import path_of
from loraplex.server.schemas import error_json
from loraplex.server.typed_errors import TYPED, TYPESAFE_ID, in_wire_shape, wire_of
from loraplex.types import BatchResult, ClassifyResult, ErrorInfo

logger = logging.getLogger(__name__)

MOST_ERRORS = 100  # of a body that are looked at; a body may have hundreds of thousands

# Errors whose messages may name files, settings or the machine.
_INTERNAL: tuple[type[LoraplexError], ...] = (
    ConfigurationError,
    *ConfigurationError.__subclasses__(),
    EngineError,
    StateError,
)
INTERNAL = frozenset(kind.code for kind in _INTERNAL)


def answer(request: Request, error: LoraplexError) -> JSONResponse:
    """Return the JSON answer for `error`, with the headers that its status requires."""
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.status == 503:
        headers["Retry-After"] = "1"
    elif error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, MethodNotAllowedError):
        headers["Allow"] = ", ".join(request.app.state.paths.methods(path_of(request.scope)))
    elif error.status == 415:
        headers["Accept-Encoding"] = ACCEPTED
    if isinstance(error, RequestTimeoutError | BodyTooLargeError):
        headers["Connection"] = "close"  # the rest of the body is not read
    shown = visible(error)
    return _json(request, error, shown, headers)


def visible(error: LoraplexError | ErrorInfo, name: str = "") -> ErrorInfo:
    """Return the error as the caller may see it. Paths and other internals are for admin keys alone. name: the
    classifier that the error is about."""
    info = ErrorInfo.of(error) if isinstance(error, LoraplexError) else error
    if logs.current().is_trusted or info.code not in INTERNAL:
        return info
    if info.code == EngineError.code:
        return replace(info, message="the server failed", remedy="send it again; the server's log has the details")
    if info.code == StateError.code:
        message, remedy = (
            "a change could not be saved, or what was saved could not be read",
            "tell the server's operator",
        )
        return replace(info, message=message, remedy=remedy)
    name = name or getattr(error, "adapter", "")
    message = f"the adapter {name!r} cannot be used" if name else "a file or a setting of the server is wrong"
    return replace(info, message=message, remedy="tell the server's operator; GET /v1/adapters tells an admin key why")


def visible_json(error: LoraplexError) -> dict[str, Any]:
    """Return the error as JSON, as the caller may see it."""
    shown = visible(error)
    return error_json(shown.code, shown.message, shown.remedy)


def visible_result(result: ClassifyResult | BatchResult) -> ClassifyResult | BatchResult:
    """Return the result with its errors as the caller may see them."""
    if logs.current().is_trusted:
        return result
    if isinstance(result, ClassifyResult):
        verdicts = (
            one if one.error is None else replace(one, error=visible(one.error, one.classifier))
            for one in result.verdicts
        )
        return replace(result, verdicts=tuple(verdicts))
    results = (
        visible_result(one) if isinstance(one, ClassifyResult) else replace(one, error=visible(one.error))
        for one in result.results
    )
    return replace(result, results=tuple(results))  # type: ignore[arg-type]  # no batch holds a batch


def _json(request: Request, error: LoraplexError, shown: ErrorInfo, headers: dict[str, str]) -> JSONResponse:
    """Return an error's answer, as its path's clients read it, and put the error into the request's log line."""
    record, path = logs.current(), path_of(request.scope)
    record.error, record.message = error.code, error.message
    if path not in PROBES:  # a probe's 503 is no failure
        request.app.state.metrics.fail(error.code)
    content = error_json(shown.code, shown.message, shown.remedy)
    wire = wire_of(path, record.body)
    if wire in TYPED:
        content, headers = in_wire_shape(wire, content, error), {**headers, TYPESAFE_ID: record.id}
    return JSONResponse(content, status_code=error.status, headers=headers)


def add_handlers(app: FastAPI) -> None:
    """Register the handlers for errors that HTTP routes raise."""
    app.add_exception_handler(LoraplexError, _loraplex_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


class AnswerErrors:
    """Middleware: answers errors that other middlewares raise, errors that no handler expected, and requests on a
    connection beyond the limit. Probes are answered there, too, so that a busy server is not taken for a dead one."""

    def __init__(self, app: ASGIApp, log_inputs: bool) -> None:
        self.app, self._log_inputs = app, log_inputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            refusal = scope.get("state", {}).get(REFUSAL)
            if refusal is not None and path_of(scope) not in PROBES:
                raise refusal
            return await self.app(scope, receive, send)
        except LoraplexError as exc:
            error = exc
        except asyncio.CancelledError:  # the drain timeout is over
            error = stopping()
        except Exception as exc:
            if self._log_inputs:
                logger.error("unexpected error", exc_info=exc)
            else:
                logger.error("unexpected error\n%s", trace(exc))
            error = unexpected(exc)
        # If the answer has begun, it stays incomplete, and uvicorn closes the connection.
        if logs.current().status is None:
            await answer(Request(scope), error)(scope, receive, send)


def unexpected(exc: BaseException) -> EngineError:
    """Return the error that answers for an exception that no code expected."""
    remedy = "report it; the server's log has the details"
    return exhaustion(exc) or EngineError(f"unexpected {type(exc).__name__}", remedy=remedy)


def trace(exc: BaseException) -> str:
    """Return the stack frames and exception types, from the first cause to `exc`. Messages are left out, because they
    may repeat what the client sent."""
    parts: list[str] = []
    left: list[BaseException | None] = [exc]
    seen = set()  # an exception in a group can have the group as its context
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            parts.append(f"{''.join(traceback.format_tb(one.__traceback__))}{type(one).__name__}")
            left += [one.__cause__ or one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]
    return "\n".join(reversed(parts))


async def _loraplex_error(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, LoraplexError)
    return answer(request, exc)


async def _validation_error(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, RequestValidationError)
    return answer(request, refusal(request, exc))


def refusal(request: Request, exc: RequestValidationError) -> InvalidRequestError:
    """Return the first error that validation found, with its path in the body."""
    if not isinstance(exc.body, dict):
        return InvalidRequestError("the body is not a JSON object", remedy=OBJECT)
    model = request.scope["route"].body_field.field_info.annotation
    errors = [{**one, "loc": one["loc"][1:]} for one in exc.errors()[:MOST_ERRORS]]  # each begins with "body"
    problem = find_problem(errors, exc.body, model, noun="field")
    return refused(problem, remedy=f"{problem.remedy}; see /docs for the fields and their types")


async def _http_error(request: Request, exc: Exception) -> JSONResponse:
    """Answer what the framework itself refuses: unknown paths and methods."""
    assert isinstance(exc, HTTPException)
    if exc.status_code in (404, 405):
        refusal = request.app.state.paths.refusal(request.method, path_of(request.scope))
        if refusal is not None:
            return answer(request, refusal)
    error = BadInputError(str(exc.detail), remedy="see /docs for the paths")
    error.status = exc.status_code
    return answer(request, error)
