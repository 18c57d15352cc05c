"""The socket that accepts connections, and how many may be open at the same time."""

import errno
import json
import logging
import resource
import socket
import time
from typing import Any

from loraplex.errors import ConfigurationError, TooManyConnectionsError
from loraplex.server.schemas import error_json

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 10_000  # by default, where the limit on open files would allow more
MOST_RESERVED = 256  # open files that adapters, downloads, SQLite and the log may need
SPARE = 8  # connections beyond the limit that wait for their request, so that probes are answered
MOST_REFUSED = 64  # connections refused in one round of the event loop
PAUSE_S = 0.9  # asyncio accepts again one second after an error


def num_allowed(wanted: int | None) -> int:
    """Raise the process's limit on open files as far as it may be raised. Return how many connections may be open.

    wanted: --max-connections. Raises ConfigurationError where the limit on open files is too low for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # macOS allows less than its hard limit says
            pass
    if soft == resource.RLIM_INFINITY:
        return wanted or MOST_CONNECTIONS
    available = max(1, soft - min(soft // 2, MOST_RESERVED))
    if wanted is not None and wanted > available:
        raise ConfigurationError(
            f"--max-connections {wanted}",
            f"this process may open {soft} files, which leaves {available} for connections",
            remedy=f"raise the limit (ulimit -n, LimitNOFILE, --ulimit nofile), or give {available} at most",
        )
    return wanted or min(available, MOST_CONNECTIONS)


class Listener(socket.socket):
    """A listening socket that refuses connections beyond a limit with 503, before they cost anything.

    An error of `accept`, such as no descriptor being left, pauses accepting for a second. Both write one line a second
    into the log at most. asyncio alone would try 2,048 times and log a traceback for each.
    """

    max_connections = MOST_CONNECTIONS
    num_open = 0  # accepted sockets that are not closed yet
    _num_refused = 0  # since the last line in the log
    _next_line = 0.0
    _paused_until = 0.0

    def accept(self) -> tuple[socket.socket, Any]:
        if time.monotonic() < self._paused_until:
            raise BlockingIOError
        for _ in range(MOST_REFUSED):
            try:
                accepted, address = super().accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                raise
            except OSError as exc:
                self._paused_until = time.monotonic() + PAUSE_S
                # With this number asyncio tells its exception handler, and tries again later.
                raise OSError(errno.EMFILE, f"connections cannot be accepted: {exc.strerror}") from None
            if self.num_open < self.max_connections + SPARE:
                self.num_open += 1
                return _Accepted(self, accepted), address
            with accepted:
                accepted.setblocking(False)
                self.log_refused()
                try:
                    accepted.send(self.refusal())
                except OSError:  # the client left
                    pass
        raise BlockingIOError  # the event loop serves the others first

    def error(self) -> TooManyConnectionsError:
        return TooManyConnectionsError(self.max_connections)

    def refusal(self) -> bytes:
        """Return the answer for a connection that has sent no request."""
        error = self.error()
        body = json.dumps(error_json(error.code, error.message, error.remedy)).encode()
        return (
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
            b"Retry-After: 1\r\nConnection: close\r\n\r\n%s" % (len(body), body)
        )

    def log_refused(self) -> None:
        self._num_refused += 1
        if (now := time.monotonic()) >= self._next_line:
            logger.warning(
                "%d connections are open, as many as --max-connections allows; refused %d since the last such line",
                self.max_connections,
                self._num_refused,
            )
            self._num_refused, self._next_line = 0, now + 1


class _Accepted(socket.socket):
    """An accepted socket, which its listener counts until it is closed."""

    def __init__(self, listener: Listener, accepted: socket.socket) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._listener = listener

    def close(self) -> None:
        if self.fileno() >= 0:
            self._listener.num_open -= 1
        super().close()
