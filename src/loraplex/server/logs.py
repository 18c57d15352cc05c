"""Log lines, as text or JSON, with the id of the request that they belong to, and one access line a request. Never
shows what a request said unless `log_inputs` is set."""

import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.errors import LoraplexError
from loraplex.server.lifecycle import PROBES
from loraplex.server.paths import Paths
from loraplex.server.proxies import path_of

logger = logging.getLogger("loraplex.access")

SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")  # no spaces: they would look like further fields in a text log
REQUEST_ID, INFERENCE_ID = b"x-request-id", b"x-amzn-sagemaker-inference-id"
QUIET = PROBES | {"/metrics"}
MOST_INPUT = 8192  # bytes of a body in a log line


@dataclass(slots=True)
class RequestRecord:
    """The facts about a request that its access line shows.

    key:         name of the API key.
    error:       code of the error that answered the request.
    message:     message of this error.
    given_id:    the id that the client sent for the request, for feedback: SageMaker's, else X-Request-ID.
    is_trusted:  whether answers may show paths and other internals: to admin keys, and where there are no keys.
    """

    id: str
    given_id: str | None = None
    key: str | None = None
    is_trusted: bool = True
    status: int | None = None
    error: str | None = None
    message: str | None = None
    body: bytes = b""


_current: ContextVar[RequestRecord] = ContextVar("request")


def current() -> RequestRecord:
    """Return the record of the request that this task works for. Works in threads that the task started with
    `asyncio.to_thread`, too."""
    return _current.get()


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s%(request)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        request = _current.get(None)
        record.request = "" if request is None else f" [{request.id}]"
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """Writes each record as one JSON object a line. The entries of a record's `fields` become fields of the object."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = _current.get(None)
        if request is not None:
            line["request_id"] = request.id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(log_format: Literal["text", "json"], level: str = "info") -> None:
    """Make all loggers of the process write to stderr in one format, ours from `level` on, and others' warnings.
    Removes the handlers that libraries added when they were imported."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for other in list(logging.root.manager.loggerDict.values()):
        if isinstance(other, logging.Logger) and other.handlers:
            other.handlers.clear()
            other.propagate = True
    logging.root.handlers[:] = [handler]
    ours = logging.getLevelNamesMapping()[level.upper()]
    logging.root.setLevel(max(ours, logging.WARNING))
    logging.getLogger("loraplex").setLevel(ours)
    logging.captureWarnings(True)


class RequestLog:
    """Middleware: gives each request an id, for its answer's headers and its log lines, and writes its access line."""

    def __init__(self, app: ASGIApp, log_inputs: bool, paths: Paths) -> None:
        self.app, self._log_inputs, self._paths = app, log_inputs, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        record = _record_of(scope)
        _current.set(record)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", record.id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self._log(scope, record, (time.perf_counter() - started) * 1000)

    def _log(self, scope: Scope, record: RequestRecord, duration_ms: float) -> None:
        path = self._paths.declared(path_of(scope))
        level = logging.DEBUG if path in QUIET and record.status in (200, 503) else logging.INFO
        if not logger.isEnabledFor(level):
            return
        fields: dict[str, Any] = {
            "method": scope["method"][:16],
            "path": path,
            "status": record.status,
            "duration_ms": round(duration_ms, 2),
            "client": (scope.get("client") or ("unknown",))[0],
        }
        text = "{method} {path} {status} {duration_ms} ms client={client}".format_map(fields)
        more: dict[str, Any] = {"key": record.key, "error": record.error}
        if self._log_inputs:
            more["error_message"] = record.message
            more["body"] = record.body[:MOST_INPUT].decode(errors="replace")
        more = {name: value for name, value in more.items() if value}
        text += "".join(f" {name}={value if name in ('key', 'error') else repr(value)}" for name, value in more.items())
        logger.log(level, "%s", text, extra={"fields": fields | more})


def log_malformed(error: LoraplexError, client: str) -> str:
    """Write the line of a request that is not HTTP, which never reaches the app. Return the request's new id."""
    record = RequestRecord(uuid.uuid4().hex)
    token = _current.set(record)
    fields = {"status": error.status, "client": client, "error": error.code}
    text = "(malformed) {status} client={client} error={error}".format_map(fields)
    logger.info("%s", text, extra={"fields": fields})
    _current.reset(token)
    return record.id


def _record_of(scope: Scope) -> RequestRecord:
    """Return the request's record. Its id is the client's X-Request-ID, else SageMaker's, if well-formed, else new."""
    ids = {name: value for name, value in scope["headers"] if name in (REQUEST_ID, INFERENCE_ID)}
    sane = [ids[name] for name in (REQUEST_ID, INFERENCE_ID) if SANE_ID.fullmatch(ids.get(name, b""))]
    id = str(sane[0], "ascii") if sane else uuid.uuid4().hex
    given = ids.get(INFERENCE_ID) or (sane and sane[0])
    return RequestRecord(id, given_id=str(given, "latin-1") if given else None)
