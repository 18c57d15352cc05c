"""The one place that turns errors into answers."""

import asyncio
import logging
import math
import traceback

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex.config import error_place
from loraplex.errors import BadInputError, EngineError, InvalidRequestError, LoraplexError, OverloadedError
from loraplex.server import logs
from loraplex.server.lifecycle import stopping
from loraplex.server.schemas import error_json

logger = logging.getLogger(__name__)


def answer(request: Request, error: LoraplexError) -> JSONResponse:
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.status == 503:
        headers["Retry-After"] = "1"
    elif error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif error.status == 408:
        headers["Connection"] = "close"  # the rest of the body may still come, or never
    return _json(request, error.status, error.code, error.message, error.remedy, headers)


def _json(
    request: Request, status: int, code: str, message: str, remedy: str, headers: dict[str, str] | None
) -> JSONResponse:
    record = logs.current()
    record.error, record.message = code, message
    request.app.state.metrics.fail(code)
    return JSONResponse(error_json(code, message, remedy), status_code=status, headers=headers)


def add_handlers(app: FastAPI) -> None:
    """For what routes raise."""
    app.add_exception_handler(LoraplexError, _loraplex_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


class AnswerErrors:
    """For what other middlewares raise, and for what nobody expected."""

    def __init__(self, app: ASGIApp, log_inputs: bool) -> None:
        self.app, self._log_inputs = app, log_inputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            return await self.app(scope, receive, send)
        except LoraplexError as exc:
            error = exc
        except asyncio.CancelledError:  # the time to drain is over
            error = stopping()
        except Exception as exc:
            name = type(exc).__name__
            # Its message may repeat what the client sent.
            logger.error("unexpected %s", name if not self._log_inputs else repr(exc), extra={"trace": _trace(exc)})
            error = EngineError(f"unexpected {name}", remedy="report it; the server's log has the details")
        if logs.current().status is None:
            await answer(Request(scope), error)(scope, receive, send)
        # Else the answer has begun, and the server closes the connection since it does not end.
