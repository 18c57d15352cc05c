"""A small HTTP/1.1 client, the same for all systems. A client's library would take as long as what is measured."""

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from loraplex.bench.call import Call, Reply
from loraplex.types import ClassifyResult

REFUSED = (429, 503)  # statuses of a server that is too busy
RESULT = TypeAdapter(ClassifyResult)

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Http:
    """Connections to one server, kept open and used again. A request that is cancelled closes its connection."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        """url: http only. Raises ValueError where it has no host or another scheme."""
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{url!r} is no http:// URL")
        self._address = parts.hostname, parts.port or 80
        self._path = parts.path.rstrip("/")
        lines = {"Host": parts.netloc, "Content-Type": "application/json", **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._idle: list[Connection] = []

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Return the answer's status and body. Raises OSError or EOFError where none comes."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(content)}\r\n\r\n"
        reader, writer = self._take() or await asyncio.open_connection(*self._address)
        is_kept = False
        try:
            writer.write(head.encode() + content)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = LENGTH.search(answer)
            if length is None:
                raise EOFError("an answer without a length")
            received = await reader.readexactly(int(length[1]))
            is_kept = b"connection: close" not in answer.lower()
            return int(answer.split(maxsplit=2)[1]), received
        finally:
            if is_kept:
                self._idle.append((reader, writer))
            else:
                writer.close()

    def _take(self) -> Connection | None:
        """Return a connection that the server has not closed."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return None

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()


async def post(http: Http, path: str, body: Any) -> tuple[bytes, Reply | None]:
    """Return the body of an answer with status 200; or else the reply that says why there is none."""
    try:
        status, content = await http.request("POST", path, body)
    except (OSError, EOFError, ValueError) as exc:
        return b"", Reply(status="failed", error=type(exc).__name__)
    if status == 200:
        return content, None
    return b"", Reply(status="refused" if status in REFUSED else "failed", error=_code(content) or str(status))


def _code(content: bytes) -> str:
    """Return the code in an error's body; empty where it has none."""
    try:
        return str(json.loads(content)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""


async def classify(http: Http, call: Call) -> Reply:
    """Ask a Loraplex server. Never raises for what it answers."""
    content, reply = await post(http, "/v1/classify", call.body)
    if reply is not None:
        return reply
    try:
        return Reply.of(RESULT.validate_json(content))
    except ValidationError:
        return Reply(status="failed", error="not_loraplex")
