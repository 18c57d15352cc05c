"""Limits on a request's size, and on the time that it may take to arrive."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.errors import (
    BadInputError,
    BodyTooLargeError,
    CancelledError,
    RequestTimeoutError,
    UnsupportedEncodingError,
)
from loraplex.server import logs


class BodyLimit:
    """Middleware: reads the whole body before the app sees the request. A body that is too large or too late is refused
    at once. The work that follows has no time limit here."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout: float) -> None:
        self.app, self._max_body_bytes, self._body_timeout = app, max_body_bytes, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        self._check_headers(scope)
        try:
            async with asyncio.timeout(self._body_timeout):
                body: bytes | None = await self._read(receive)
        except TimeoutError:
            raise RequestTimeoutError(
                f"the body did not arrive within {self._body_timeout:g} seconds",
                remedy="send it faster, or raise --body-timeout",
            ) from None
        assert body is not None
        logs.current().body = body

        async def receive_body() -> Message:
            """Return the body once, then the client's later messages, such as its disconnect."""
            nonlocal body
            if body is None:
                return await receive()
            message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        await self.app(scope, receive_body, send)

    def _check_headers(self, scope: Scope) -> None:
        length, is_chunked = None, False
        for name, value in scope["headers"]:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                is_chunked = True
            elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                raise UnsupportedEncodingError(
                    f"Content-Encoding is {value.decode('latin-1')!r}, which this server does not read",
                    remedy="send the body uncompressed, without Content-Encoding",
                )
        # A proxy may trust the one header and we the other: requests could be smuggled.
        if length is not None and is_chunked:
            raise BadInputError("both Content-Length and Transfer-Encoding are given", remedy="send one of them")
        if length is not None and length > self._max_body_bytes:
            raise self._too_large()

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise CancelledError("the client left", remedy="none is needed")
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body has more than {self._max_body_bytes} bytes",
            remedy="send less at once, or raise --max-body-bytes",
        )
