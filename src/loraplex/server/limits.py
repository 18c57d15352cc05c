"""Limits on a request's size, and on the time that it may take to arrive."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.errors import (
    BadInputError,
    BodyTooLargeError,
    CancelledError,
    RequestTimeoutError,
)
from loraplex.server import logs
from loraplex.server.encodings import Decompressor, decompressor_of


class BodyLimit:
    """Middleware: reads the whole body before the app sees the request. A body that is too large or too late is refused
    at once, before and after it is decompressed. The work that follows has no time limit here."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout: float) -> None:
        self.app, self._max_body_bytes, self._body_timeout = app, max_body_bytes, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        decompressor = self._check_headers(scope)
        try:
            async with asyncio.timeout(self._body_timeout):
                body: bytes | None = await self._read(receive, decompressor)
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

    def _check_headers(self, scope: Scope) -> Decompressor | None:
        """Return what decompresses the body, if it is compressed."""
        length, is_chunked, codings = None, False, []
        for name, value in scope["headers"]:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                is_chunked = True
            elif name == b"content-encoding":
                codings.append(value.decode("latin-1"))
        # A proxy may trust the one header and we the other: requests could be smuggled.
        if length is not None and is_chunked:
            raise BadInputError("both Content-Length and Transfer-Encoding are given", remedy="send one of them")
        if length is not None and length > self._max_body_bytes:
            raise self._too_large()
        return decompressor_of(", ".join(codings))

    async def _read(self, receive: Receive, decompressor: Decompressor | None) -> bytes:
        body, num_received = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise CancelledError("the client left", remedy="none is needed")
            piece = message.get("body", b"")
            num_received += len(piece)
            if num_received > self._max_body_bytes:
                raise self._too_large()
            body += (
                piece if decompressor is None else decompressor.decompress(piece, self._max_body_bytes + 1 - len(body))
            )
            if len(body) > self._max_body_bytes:
                raise self._too_large(" when it is decompressed")
            if not message.get("more_body", False):
                if decompressor is not None:
                    decompressor.check_end()
                return bytes(body)

    def _too_large(self, when: str = "") -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body has more than {self._max_body_bytes} bytes{when}",
            remedy="send less at once, or raise --max-body-bytes",
        )
