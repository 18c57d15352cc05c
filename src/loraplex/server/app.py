"""Puts a backend behind HTTP: routes, and the one place that turns errors into answers."""

import logging
import signal
import socket
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import loraplex
from loraplex.backends.base import Backend
from loraplex.config import ServerConfig
from loraplex.errors import BadInputError, ConfigurationError, EngineError, InvalidRequestError, LoraplexError
from loraplex.server import routes, sagemaker
from loraplex.server.schemas import error_json

logger = logging.getLogger(__name__)


def create_app(backend: Backend) -> FastAPI:
    """An ASGI app over `backend`, which the caller starts and closes."""
    app = FastAPI(
        title="Loraplex",
        summary="Many LoRA classifiers from one base model, in one call",
        version=loraplex.__version__,
    )
    app.state.backend = backend
    app.state.created = int(time.time())
    app.include_router(routes.router)
    app.include_router(sagemaker.router)
    app.add_exception_handler(LoraplexError, _loraplex_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)
    return app


def bind(config: ServerConfig) -> socket.socket:
    """Take the port without listening yet, so that a taken port is known before a model is loaded."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host, config.port))
    except OSError as exc:
        sock.close()
        raise ConfigurationError(
            f"--host {config.host} --port {config.port}",
            f"cannot be bound: {exc.strerror}",
            remedy="choose another --port",
        ) from None
    return sock


async def serve(backend: Backend, config: ServerConfig, sock: socket.socket, on_ready: Callable[[], None]) -> None:
    """Start `backend`, then listen on `sock` and call `on_ready`; return after SIGTERM or SIGINT, when the requests in
    flight are answered (`drain_timeout` seconds at most). ConfigurationError: the backend did not start."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_ready()

    await backend.start()
    try:
        # uvicorn raises the signal that stopped it once more for whoever handled it before us.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        settings = uvicorn.Config(
            create_app(backend),
            log_level="warning",
            timeout_graceful_shutdown=config.drain_timeout,
            lifespan="off",
        )
        await Server(settings).serve(sockets=[sock])
    finally:
        await backend.close()


def _loraplex_error(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, LoraplexError)
    headers = {"Retry-After": "1"} if exc.status in (429, 503) else None
    return JSONResponse(error_json(exc), status_code=exc.status, headers=headers)


_TRIED = {"body", "article", "native", "str"}


def _validation_error(request: Request, exc: Exception) -> JSONResponse:
    """The first thing wrong, with its place in the body."""
    assert isinstance(exc, RequestValidationError)
    first = max(exc.errors(), key=lambda error: len(error["loc"]))  # of alternatives, the one that got furthest
    # Without the names of the alternatives that pydantic tried.
    place = [part for part in map(str, first["loc"]) if part not in _TRIED and "[" not in part]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        error: LoraplexError = BadInputError(f"the body is not JSON: {reason}", remedy="send one JSON object in UTF-8")
    elif not place and first["type"] in ("missing", "model_attributes_type"):
        error = InvalidRequestError(
            "the body is not a JSON object", remedy="send a JSON object with Content-Type: application/json"
        )
    else:
        error = InvalidRequestError(
            f"{'.'.join(place)}: {first['msg']}", remedy="see /docs for the fields and their types"
        )
    return JSONResponse(error_json(error), status_code=error.status)


def _http_error(request: Request, exc: Exception) -> JSONResponse:
    """What the framework itself refuses: unknown paths and methods, bodies that cannot be decoded."""
    assert isinstance(exc, HTTPException)
    known = {
        400: ("bad_input", "the body cannot be decoded", "send one JSON object in UTF-8"),
        404: ("not_found", f"no route {request.url.path!r}", "see /docs for the routes"),
        405: (
            "method_not_allowed",
            f"{request.method} is not for {request.url.path!r}",
            "see /docs for the routes",
        ),
    }
    code, message, remedy = known.get(exc.status_code, ("http_error", str(exc.detail), "see /docs for the routes"))
    body = {"error": {"code": code, "message": message, "remedy": remedy}}
    return JSONResponse(body, status_code=exc.status_code, headers=exc.headers)


def _unexpected_error(request: Request, exc: Exception) -> JSONResponse:
    logger.error("unexpected error on %s", request.url.path, exc_info=exc)
    error = EngineError(f"unexpected {type(exc).__name__}", remedy="report it; the server's log has the details")
    return JSONResponse(error_json(error), status_code=error.status)
