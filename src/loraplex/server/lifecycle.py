"""Whether the server accepts requests: none while it loads, no new ones while it drains."""

from collections.abc import Collection
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.errors import NotReadyError
from loraplex.routing.router import Router
from loraplex.server.proxies import path_of

PROBES = frozenset({"/health", "/ready", "/ping"})
REFUSAL = "loraplex.refusal"  # key of a scope's state: the error for a request on a connection beyond the limit


def stopping() -> NotReadyError:
    """Return the error that answers requests while the server stops."""
    return NotReadyError("the server is stopping", remedy="retry on another server, or when this one has restarted")


class Lifecycle:
    """The server's phase: loading, then ready with a router, then draining."""

    def __init__(self, router: Router | None = None) -> None:
        """Begin in the phase `loading`, or in `ready` if `router` has already started."""
        self.phase: Literal["loading", "ready", "draining"] = "loading" if router is None else "ready"
        self._router = router
        self.num_in_flight = 0

    @property
    def router(self) -> Router:
        """The router that has started. Raises NotReadyError while the server loads."""
        if self._router is None:
            raise _loading()
        return self._router

    def loaded(self, router: Router) -> bool:
        """Store the router that has started. Return whether the server accepts requests now: False if it was told to
        stop meanwhile."""
        self._router = router
        if self.phase == "loading":
            self.phase = "ready"
        return self.phase == "ready"

    def check_ready(self) -> None:
        """Raise NotReadyError while the server loads or drains."""
        if self.phase == "loading":
            raise _loading()
        if self.phase == "draining":
            raise stopping()


def _loading() -> NotReadyError:
    return NotReadyError("the model is loading", remedy="wait until /ready answers 200")


class Gate:
    """Middleware: refuses everything except probes unless the server is ready, and counts the requests in flight.

    always: further paths that are answered at any time."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, always: Collection[str] = ()) -> None:
        self.app, self._lifecycle, self._always = app, lifecycle, PROBES.union(always)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if path_of(scope) in self._always:
            return await self.app(scope, receive, send)
        self._lifecycle.check_ready()
        self._lifecycle.num_in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._lifecycle.num_in_flight -= 1


class LastAnswer:
    """Middleware: adds `Connection: close` to every answer, refusals included, while the server drains. Also on a
    connection beyond the limit, and where a request has Content-Length beside Transfer-Encoding (RFC 9112, 6.1)."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app, self._lifecycle = app, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope.get("headers", ())}
        is_ambiguous = names >= {b"content-length", b"transfer-encoding"}
        is_spare = REFUSAL in scope.get("state", ())

        async def send_last(message: Message) -> None:
            is_last = is_spare or is_ambiguous or self._lifecycle.phase == "draining"
            if message["type"] == "http.response.start" and is_last:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self.app(scope, receive, send_last)
