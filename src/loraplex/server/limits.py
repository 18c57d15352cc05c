"""Limits on a request's size, and on the time that it may take to arrive."""

import asyncio

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol

from loraplex.errors import BadInputError, BodyTooLargeError, CancelledError, RequestTimeoutError
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


class IdleLimit(H11Protocol):
    """An HTTP/1.1 connection that closes itself after `timeout_keep_alive` seconds without progress.

    No progress means that no complete request head arrives, or that the client does not read its answer. uvicorn's own
    timer starts only with the first answer, and any byte stops it. A client could then hold a connection by sending
    nothing, a head byte by byte, or an endless body that was refused.

    The class also notices a disconnect while bytes wait behind a request. It closes the connection if the rest of a
    request is malformed after its answer was sent.
    """

    @property
    def is_new(self) -> bool:
        """Whether no request has arrived on this connection yet."""
        return self.cycle is None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        # uvicorn's method also stops the timer here, at any byte. `handle_events` stops it at a complete request head.
        self.conn.receive_data(data)
        self.handle_events()
        # When bytes follow a request, uvicorn stops reading until the answer is sent, and would miss a disconnect.
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < HIGH_WATER_LIMIT:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # the request was answered before its body had arrived
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        self._unread.cancel()
        super().resume_writing()
