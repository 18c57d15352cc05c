"""The server process: it takes its port, answers probes while it loads, and drains when told to stop. It ends when the
engine dies."""

import asyncio
import ipaddress
import logging
import math
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from types import FrameType
from typing import Any

import uvicorn

from loraplex.config import ServerConfig
from loraplex.errors import ConfigurationError, EngineError
from loraplex.routing.router import Router
from loraplex.server.app import create_app
from loraplex.server.connection import Connection, OpenConnections
from loraplex.server.keys import ENVIRONMENT, ApiKey
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.listener import Listener, num_allowed

logger = logging.getLogger(__name__)

POLL_S = 0.1
CLOSE_S = 5.0  # longest wait for the router to close; the end of the process frees everything anyway


def listen(config: ServerConfig, keys: Sequence[ApiKey]) -> Listener:
    """Bind the port and return the listening socket. Raises the process's limit on open files.

    Raises ConfigurationError if the port cannot be bound, if other machines could reach it without a key, if keys are
    limited and there are none, or if --max-connections is too high."""
    if config.key_concurrency is not None and not keys:
        raise ConfigurationError(
            f"--key-concurrency {config.key_concurrency}",
            "has no effect without API keys",
            remedy=f"give keys with --api-key-file or {ENVIRONMENT}, or leave it out",
        )
    max_connections = num_allowed(config.max_connections)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio sets TCP_NODELAY only if the protocol is named. Without it, half of an answer can wait 40 ms.
    sock = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.max_connections = max_connections
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host, config.port))
        # Check the bound address, not the given host: a name or an empty host can mean any address.
        if not (keys or config.insecure or ipaddress.ip_address(sock.getsockname()[0]).is_loopback):
            raise ConfigurationError(
                f"--host {config.host}",
                "can be reached from other machines, and there are no API keys",
                remedy=f"give keys with --api-key-file or {ENVIRONMENT}, or --insecure to answer everyone",
            )
        sock.listen(2048)
    except (OSError, ValueError, OverflowError) as exc:  # ValueError: no name of a host, such as "a..b"
        sock.close()
        raise ConfigurationError(
            f"--host {config.host} --port {config.port}",
            f"cannot be bound: {getattr(exc, 'strerror', None) or exc}",
            remedy="choose another --host or --port",
        ) from None
    except ConfigurationError:
        sock.close()
        raise
    return sock


def url_of(config: ServerConfig, sock: socket.socket) -> str:
    """Return the server's own URL, with the prefix of its paths."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{sock.getsockname()[1]}{config.root_path}"


async def serve(
    start: Callable[[], Coroutine[Any, Any, Router]],
    config: ServerConfig,
    keys: Sequence[ApiKey],
    sock: Listener,
    on_ready: Callable[[Router], None],
) -> None:
    """Serve on `sock` until SIGTERM or SIGINT.

    While `start` makes the router, only probes are answered; then everything is, and `on_ready` is called with the
    router. After the signal, requests in flight have `drain_timeout` seconds to finish. Raises ConfigurationError if
    the router does not start, and EngineError if the engine dies.
    """
    lifecycle = Lifecycle()
    settings = uvicorn.Config(
        create_app(config, keys, lifecycle),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=math.ceil(config.idle_timeout),
    )
    server = _Server(settings, lifecycle, config.drain_timeout, sock)
    asyncio.get_running_loop().set_exception_handler(_log_loop_error)
    # After its shutdown, uvicorn raises the signal again for the handlers that were installed before its own.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    running = asyncio.create_task(_run(start, config, lifecycle, on_ready))
    running.add_done_callback(lambda _: server.stop())
    try:
        await server.serve(sockets=[sock])
    finally:
        running.cancel()
        # A load that hangs in a thread cannot be cancelled.
        if (await asyncio.wait({running}, timeout=CLOSE_S))[1]:
            logger.warning("not closed within %g seconds", CLOSE_S)
    if not running.cancelled() and running.done():
        running.result()


async def _run(
    start: Callable[[], Coroutine[Any, Any, Router]],
    config: ServerConfig,
    lifecycle: Lifecycle,
    on_ready: Callable[[Router], None],
) -> None:
    """Start the router and run until cancelled. Raises if the router does not start, or when the engine dies."""
    router = await start()
    try:
        check_aliases(config, router)
        if router.service.alive and lifecycle.loaded(router):
            on_ready(router)
        while router.service.alive:
            await asyncio.sleep(POLL_S)
        raise EngineError("the engine died", remedy="see the log above; start the server again")
    finally:
        await router.close()


def check_aliases(config: ServerConfig, router: Router) -> None:
    """Raise ConfigurationError where an alias has no effect, because a classifier or a route of this name answers. The
    aliases by default give way to them."""
    for alias in config.decisions_alias if "decisions_alias" in config.model_fields_set else ():
        if router.knows(alias):
            raise ConfigurationError(
                f"--decisions-alias {alias}",
                "is the name of a classifier or a route, which then answers every question",
                remedy="choose another alias, or leave it out",
            )


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error of the event loop. One of `accept` takes one line: it comes again each second while it lasts."""
    if "socket" in context and isinstance(context.get("exception"), OSError):
        logger.warning("%s; trying again in a second", context["exception"].strerror)
    else:
        loop.default_exception_handler(context)


class _Server(uvicorn.Server):
    """uvicorn's server, with a drain before its shutdown."""

    def __init__(
        self, settings: uvicorn.Config, lifecycle: Lifecycle, drain_timeout: float, listener: Listener
    ) -> None:
        super().__init__(settings)
        self.server_state = OpenConnections(listener)
        self._lifecycle, self._drain_timeout = lifecycle, drain_timeout

    def stop(self) -> None:
        self._lifecycle.phase = "draining"
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._lifecycle.phase = "draining"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then shut down. The server keeps listening while requests are in flight, so that probes learn that it
        accepts no more."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._drain_timeout
        for connection in list(self.server_state.connections):
            assert isinstance(connection, Connection)
            if not connection.is_new:  # the first request of a new connection may be on its way
                connection.shutdown()  # closes at once if idle, else after its answer
        while True:
            await asyncio.sleep(POLL_S / 2)  # at least once, so that a new connection gets an answer
            if not self._lifecycle.num_in_flight or loop.time() >= ends or self.force_exit:
                break
        self.config.timeout_graceful_shutdown = max(0, math.ceil(ends - loop.time()))
        await super().shutdown(sockets)
        if self.server_state.tasks:  # cancelled tasks still answer that the server stops
            await asyncio.wait(self.server_state.tasks, timeout=1)
