"""Puts a backend behind HTTP: routes, and the one place that turns errors into answers."""

import logging
import signal
import socket
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, Request
from fastapi import HTTPException as FastAPIHTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

import loraplex
from loraplex.config import ServerConfig, error_place
from loraplex.errors import BadInputError, ConfigurationError, EngineError, InvalidRequestError, LoraplexError
from loraplex.metrics import Metrics
from loraplex.routing.router import Router
from loraplex.server import admin, routes, routing, sagemaker
from loraplex.server.schemas import error_json

logger = logging.getLogger(__name__)


def create_app(router: Router, config: ServerConfig) -> FastAPI:
    """An ASGI app over `router` and its backend, which the caller starts and closes."""
    app = FastAPI(
        title="Loraplex",
        summary="Many LoRA classifiers from one base model, in one call",
        version=loraplex.__version__,
        redirect_slashes=False,
    )
    app.state.router = router
    app.state.backend = router.backend
    app.state.metrics = Metrics(router.backend.stats, router.knows, router.num_shadows_shed)
    app.state.created = int(time.time())
    app.include_router(routes.router)
    app.include_router(sagemaker.router)
    app.include_router(admin.router)
    app.include_router(routing.router)
    app.add_middleware(_BodyLimit, max_body_bytes=config.max_body_bytes)
    app.add_middleware(sagemaker.RuntimeApi)  # outermost: whatever refuses a request, AWS's clients understand it
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
        raise _cannot_bind(config, exc) from None
    return sock


def url_of(config: ServerConfig, sock: socket.socket) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{sock.getsockname()[1]}"


def _cannot_bind(config: ServerConfig, exc: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"--host {config.host} --port {config.port}",
        f"cannot be bound: {exc.strerror or exc}",
        remedy="choose another --host or --port",
    )


async def serve(router: Router, config: ServerConfig, sock: socket.socket, on_ready: Callable[[], None]) -> None:
    """Start `router` and its backend, then listen on `sock` and call `on_ready`; return after SIGTERM or SIGINT, when
    the requests in flight are answered (`drain_timeout` seconds at most). ConfigurationError: it did not start."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            try:
                sock.listen(self.config.backlog)
            except OSError as exc:  # another server that was started meanwhile has begun to listen
                raise _cannot_bind(config, exc) from None
            await super().startup(sockets)
            if self.started:
                on_ready()

    await router.start()
    try:
        # uvicorn raises the signal that stopped it once more for whoever handled it before us.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        settings = uvicorn.Config(
            create_app(router, config),
            log_level="warning",
            timeout_graceful_shutdown=config.drain_timeout,
            lifespan="off",
        )
        await Server(settings).serve(sockets=[sock])
    finally:
        await router.close()


class _BodyLimit:
    """Refuses a body as soon as it is known to be too large: by its Content-Length, else when that much has come."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        received = int(Headers(scope=scope).get("content-length", 0))

        chunked = not received

        async def limited() -> ASGIMessage:
            nonlocal received
            if received > self.max_body_bytes:
                raise FastAPIHTTPException(413, f"the body has more than {self.max_body_bytes} bytes")
            message = await receive()
            if message["type"] == "http.request" and chunked:
                received += len(message.get("body", b""))
            return message

        await self.app(scope, limited, send)


def _answer(request: Request, error: LoraplexError) -> JSONResponse:
    request.app.state.metrics.fail(error.code)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error_json(error.code, error.message, error.remedy), status_code=error.status, headers=headers)


async def _loraplex_error(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, LoraplexError)
    return _answer(request, exc)


async def _validation_error(request: Request, exc: Exception) -> JSONResponse:
    """The first thing wrong, with its place in the body."""
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return _answer(
            request, BadInputError(f"the body is not JSON: {reason}", remedy="send one JSON object in UTF-8")
        )
    if exc.body is None:
        return _answer(request, BadInputError("the body is empty", remedy="send one JSON object in UTF-8"))
    if not isinstance(exc.body, dict):
        remedy = "send a JSON object with Content-Type: application/json"
        return _answer(request, InvalidRequestError("the body is not a JSON object", remedy=remedy))
    place = error_place(first, exc.body)
    message = f"{place}: {first['msg']}" if place else first["msg"]
    return _answer(request, InvalidRequestError(message, remedy="see /docs for the fields and their types"))


async def _http_error(request: Request, exc: Exception) -> JSONResponse:
    """What the framework itself refuses: unknown paths and methods, bodies that cannot be decoded or are too large."""
    assert isinstance(exc, HTTPException)
    path = request.url.path
    known = {
        400: ("bad_input", "the body cannot be decoded", "send one JSON object in UTF-8"),
        404: ("not_found", f"no route {path!r}", "see /docs for the routes"),
        405: ("method_not_allowed", f"{request.method} is not for {path!r}", "see /docs for the routes"),
        413: ("body_too_large", str(exc.detail), "send less at once, or raise --max-body-bytes"),
    }
    code, message, remedy = known.get(exc.status_code, ("http_error", str(exc.detail), "see /docs for the routes"))
    request.app.state.metrics.fail(code)
    return JSONResponse(error_json(code, message, remedy), status_code=exc.status_code, headers=exc.headers)


async def _unexpected_error(request: Request, exc: Exception) -> JSONResponse:
    logger.error("unexpected error on %s", request.url.path, exc_info=exc)
    return _answer(
        request, EngineError(f"unexpected {type(exc).__name__}", remedy="report it; the server's log has the details")
    )
