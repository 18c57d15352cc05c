"""Whether the server takes requests: not while it loads, and no new ones while it drains."""

from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.errors import NotReadyError

PROBES = frozenset({"/health", "/ready", "/ping"})


def stopping() -> NotReadyError:
    return NotReadyError("the server is stopping", remedy="send it to another server, or again when it is back")


class Lifecycle:
    def __init__(self, phase: Literal["loading", "ready", "draining"] = "ready") -> None:
        self.phase = phase
        self.num_in_flight = 0

    def check_ready(self) -> None:
        """NotReadyError"""
        if self.phase == "loading":
            raise NotReadyError("the model is loading", remedy="wait until /ready answers 200")
        if self.phase == "draining":
            raise stopping()


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
