"""Whether the server takes requests: not while it loads, and no new ones while it drains."""

from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.errors import NotReadyError
from loraplex.routing.router import Router

PROBES = frozenset({"/health", "/ready", "/ping"})


def stopping() -> NotReadyError:
    return NotReadyError("the server is stopping", remedy="send it to another server, or again when it is back")


class Lifecycle:
    """Loading, then ready with a router, then draining."""

    def __init__(self, router: Router | None = None) -> None:
        """router: where it has started already."""
        self.phase: Literal["loading", "ready", "draining"] = "loading" if router is None else "ready"
        self._router = router
        self.num_in_flight = 0

    @property
    def router(self) -> Router:
        """NotReadyError while the server loads."""
        if self._router is None:
            raise _loading()
        return self._router

    def loaded(self, router: Router) -> bool:
        """The router has started. Returns whether requests are taken now: not where the server was told to stop."""
        self._router = router
        if self.phase == "loading":
            self.phase = "ready"
        return self.phase == "ready"

    def check_ready(self) -> None:
        """NotReadyError"""
        if self.phase == "loading":
            raise _loading()
        if self.phase == "draining":
            raise stopping()


def _loading() -> NotReadyError:
    return NotReadyError("the model is loading", remedy="wait until /ready answers 200")


class Gate:
    """Lets nothing but probes pass where the server is not ready, and counts what it let pass."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app, self._lifecycle = app, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"] in PROBES:
            return await self.app(scope, receive, send)
        self._lifecycle.check_ready()
        self._lifecycle.num_in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._lifecycle.num_in_flight -= 1


class LastAnswer:
    """While the server drains, each connection's answer is its last, and says so: refusals too."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app, self._lifecycle = app, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and self._lifecycle.phase == "draining":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self.app(scope, receive, send_last)
