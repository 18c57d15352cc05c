"""An HTTP/1.1 connection: how long it may be idle, what answers bytes that are not HTTP, and how it ends."""

import asyncio
import json
import logging
import re
import sys
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from loraplex.errors import HeadTooLargeError, LoraplexError, MalformedHttpError
from loraplex.server.head import MAX_HEAD_BYTES, HeadConnection
from loraplex.server.lifecycle import REFUSAL
from loraplex.server.listener import Listener
from loraplex.server.logs import log_malformed
from loraplex.server.proxies import address_of
from loraplex.server.schemas import error_json

LINGER_S = 2.0  # longest time for which the rest of a refused body is read and thrown away
FIRST_REQUEST_S = 1.0  # how long a connection beyond the limit may wait for its request

# uvicorn's own logger, without its warnings: any client can cause them, and they name no request.
_uvicorn = logging.getLogger("uvicorn.error.connection")
_uvicorn.setLevel(logging.ERROR)


class OpenConnections(ServerState):
    """uvicorn's record of its connections, with the listener that counts them."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.listener = listener


class Connection(H11Protocol):
    """A connection that closes itself after `timeout_keep_alive` seconds without progress.

    No progress means that no complete request head arrives, or that the client does not read its answer. uvicorn's own
    timer starts only with the first answer, and any byte stops it. A client could then hold a connection by sending
    nothing, a head byte by byte, or an endless body that was refused.

    A connection beyond the limit answers one request, with 503 unless it is a probe, and waits a second for it. The
    class also notices a disconnect while bytes wait behind a request, and answers malformed HTTP with our JSON.
    """

    @property
    def is_new(self) -> bool:
        """Whether no request has arrived on this connection yet."""
        return self.cycle is None

    @property
    def _listener(self) -> Listener:
        assert isinstance(self.server_state, OpenConnections)
        return self.server_state.listener

    @property
    def _is_spare(self) -> bool:
        return REFUSAL in self.app_state

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn = HeadConnection()
        if self.client is not None and (address := address_of(self.client[0])):
            self.client = str(address), self.client[1]
        self.logger = _uvicorn
        self.transport = _LingeringTransport(self, transport)  # type: ignore[assignment]
        seconds: float = self.timeout_keep_alive
        if len(self.connections) > self._listener.max_connections:
            self.app_state = {REFUSAL: self._listener.error()}  # each of its requests has this in its scope
            seconds = min(seconds, FIRST_REQUEST_S)
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        # uvicorn's method also stops the timer here, at any byte. `handle_events` stops it at a complete request head.
        self.conn.receive_data(data)
        self.handle_events()
        # When bytes follow a request, uvicorn stops reading until the answer is sent, and would miss a disconnect.
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < HIGH_WATER_LIMIT:
            self.flow.resume_reading()

    def timeout_keep_alive_handler(self) -> None:
        if self._is_spare and self.is_new and not self.transport.is_closing():
            self._listener.log_refused()
            self.transport.write(self._listener.refusal())
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP, then close. Called while h11's error is handled."""
        exc = sys.exception()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # the request was answered before its body had arrived
            return
        error = _malformed(exc)
        body = json.dumps(error_json(error.code, error.message, error.remedy)).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (b"x-request-id", log_malformed(error, "unknown" if self.client is None else self.client[0]).encode()),
        ]
        reason = STATUS_PHRASES[error.status]
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=reason),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        if self.cycle is not None and not self.cycle.response_complete:  # it waits for the rest of its body
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        self._unread.cancel()
        super().resume_writing()


def _malformed(exc: BaseException | None) -> LoraplexError:
    """Return the error for what h11 could not read."""
    status = getattr(exc, "error_status_hint", 400)
    if status == HeadTooLargeError.status:
        return HeadTooLargeError(
            f"the request's head has more than {MAX_HEAD_BYTES} bytes", remedy="send fewer or shorter headers"
        )
    reason = re.sub(r"bytearray\(b(['\"].*['\"])\)", r"\1", str(exc))
    remedy = "correct the request; this port takes HTTP/1.1 without TLS"
    error = MalformedHttpError(f"the request is not HTTP/1.1: {reason}", remedy=remedy)
    error.status = status
    return error


class _LingeringTransport:
    """A transport whose `close` gives the client time to read the answer.

    Closing a socket that has unread bytes resets the connection, and the client may lose the answer. So where a request
    has not arrived as a whole, `close` ends the sending only. What still arrives is thrown away until the client closes
    too, or LINGER_S are over. A second `close` closes at once.
    """

    def __init__(self, connection: Connection, transport: asyncio.Transport) -> None:
        self._connection, self._transport = connection, transport
        self._is_lingering = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._is_lingering or self._transport.is_closing()

    def close(self) -> None:
        is_arriving = self._connection.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if self._is_lingering or not is_arriving or self._transport.is_closing():
            self._transport.close()
            return
        self._is_lingering = True
        try:
            self._transport.write_eof()
        except OSError:  # the client has reset the connection
            self._transport.abort()
        self._transport.resume_reading()
        self._connection.loop.call_later(LINGER_S, self._transport.close)
