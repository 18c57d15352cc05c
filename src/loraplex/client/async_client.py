"""`AsyncClient`: the client for asyncio."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, overload

import httpx

from loraplex.client import call
from loraplex.client.call import Answer, Call
from loraplex.client.exchange import POLL_S, Connection, Exchange, Outcome
from loraplex.client.many import Conversation, check, id_and_input, in_tasks, progress_bar
from loraplex.decisions import Decisions
from loraplex.discovery import SkippedFolder
from loraplex.errors import LoraplexError
from loraplex.types import (
    AdapterInfo,
    ClassifyResult,
    Examples,
    Input,
    ModelInfo,
    Question,
    Roles,
    Route,
    RouteStats,
    classifier_names,
)


class AsyncClient:
    """Client of a running server, for asyncio.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            (await client.classify("Customer: Thanks, that's all!"))["issueResolved"].label

    Arguments, answers, errors and retries are those of `Client`. A cancelled call closes its connection, and the server
    drops the work.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | None = 30.0,
        max_retries: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Take the arguments of `Client`. Nothing is sent yet."""
        self._connection = Connection.to(base_url, api_key, timeout, max_retries)
        self._http = httpx.AsyncClient(transport=transport, **self._connection.options())
        self._sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def classify(
        self,
        input: Input,
        classifiers: str | Iterable[str] = "*",
        *,
        conversation_id: str | None = None,
        deadline_ms: float | None = None,
        roles: Roles | None = None,
        cascade: bool = True,
    ) -> ClassifyResult:
        """Return one verdict for each classifier, in the order requested. See `Client.classify`."""
        return await self._ask(call.classify(input, classifiers, conversation_id, deadline_ms, roles, cascade))

    async def decide(
        self,
        state: Any,
        questions: Mapping[str, Question],
        model: str = "*",
        *,
        conversation_id: str | None = None,
        deadline_ms: float | None = None,
        roles: Roles | None = None,
        cascade: bool = True,
    ) -> Decisions:
        """Return an answer to each typed question about a state. See `Client.decide`."""
        asked = call.decide(state, questions, model, conversation_id, deadline_ms, roles, cascade)
        return (await self._ask(asked)).decisions(questions)

    @overload
    async def classify_many(
        self,
        conversations: Iterable[Conversation],
        classifiers: str | Iterable[str] = "*",
        *,
        concurrency: int = 8,
        deadline_ms: float | None = None,
        roles: Roles | None = None,
        cascade: bool = True,
        progress: bool = False,
        on_error: Literal["raise"] = "raise",
    ) -> list[ClassifyResult]: ...

    @overload
    async def classify_many(
        self,
        conversations: Iterable[Conversation],
        classifiers: str | Iterable[str] = "*",
        *,
        concurrency: int = 8,
        deadline_ms: float | None = None,
        roles: Roles | None = None,
        cascade: bool = True,
        progress: bool = False,
        on_error: Literal["return"],
    ) -> list[ClassifyResult | LoraplexError]: ...

    async def classify_many(
        self,
        conversations: Iterable[Conversation],
        classifiers: str | Iterable[str] = "*",
        *,
        concurrency: int = 8,
        deadline_ms: float | None = None,
        roles: Roles | None = None,
        cascade: bool = True,
        progress: bool = False,
        on_error: Literal["raise", "return"] = "raise",
    ) -> list[ClassifyResult] | list[ClassifyResult | LoraplexError]:
        """Classify each conversation, and return the results in order. See `Client.classify_many`. A generator is read
        on the event loop, so it should not block. A raised error, or a cancellation, cancels all calls in flight."""
        check(conversations, concurrency)
        names = classifier_names(classifiers)
        with progress_bar(conversations, progress) as advance:

            async def classify(conversation: Conversation) -> ClassifyResult | LoraplexError:
                try:
                    conversation_id, input = id_and_input(conversation)
                    return await self._ask(call.classify(input, names, conversation_id, deadline_ms, roles, cascade))
                except LoraplexError as exc:
                    if on_error == "raise":
                        raise
                    return exc
                finally:
                    advance()

            return await in_tasks(classify, conversations, concurrency)

    async def feedback(self, verdict_id: str, label: str) -> int:
        """Record a verdict's right label, and return how many answers it applies to. See `Client.feedback`."""
        return (await self._ask(call.feedback(verdict_id, label))).num_answers

    async def feedback_on_request(self, request_id: str, label: str, classifier: str | None = None) -> int:
        """Record the right label of a request's verdict. See `Client.feedback_on_request`."""
        return (await self._ask(call.feedback(None, label, request_id, classifier))).num_answers

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        """Return all adapters with their states."""
        return (await self._ask(call.ADAPTERS)).adapters

    async def skipped(self) -> tuple[SkippedFolder, ...]:
        """Return the bundle's folders that hold an adapter and were left out at the start, with the reasons."""
        return (await self._ask(call.ADAPTERS)).skipped

    async def adapter(self, name: str) -> AdapterInfo:
        """Return one adapter. Raises UnknownClassifierError if no adapter has this name."""
        return await self._ask(call.adapter(name))

    async def load_adapter(self, name: str, source: str | PathLike[str], *, pin: bool | None = None) -> AdapterInfo:
        """Load or replace an adapter. Returns when the new version answers. See `Client.load_adapter`."""
        return await self._ask(call.load_adapter(name, source, pin))

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter. Returns when its memory is free. See `Client.unload_adapter`."""
        await self._ask(call.unload_adapter(name))

    async def pin_adapter(self, name: str, is_pinned: bool = True) -> AdapterInfo:
        """Pin or unpin an adapter. A pinned adapter keeps its slot on the device. See `Client.pin_adapter`."""
        return await self._ask(call.pin_adapter(name, is_pinned))

    async def models(self) -> tuple[ModelInfo, ...]:
        """Return the base, then all routes and adapters."""
        return (await self._ask(call.MODELS)).data

    async def routes(self) -> tuple[Route, ...]:
        """Return all routes."""
        return (await self._ask(call.ROUTES)).routes

    async def route(self, name: str) -> Route:
        """Return one route. Raises UnknownRouteError if no route has this name."""
        return await self._ask(call.route(name))

    async def set_route(self, name: str, targets: Mapping[str, float], shadows: Iterable[str] = ()) -> Route:
        """Create or replace a route. See `Client.set_route`."""
        return await self._ask(call.set_route(name, targets, shadows))

    async def delete_route(self, name: str) -> None:
        """Delete a route. Raises UnknownRouteError if no route has this name."""
        await self._ask(call.delete_route(name))

    async def rollback_route(self, name: str) -> Route:
        """Undo the last change of a route, also its deletion. See `Client.rollback_route`."""
        return await self._ask(call.rollback_route(name))

    async def route_stats(self, name: str) -> RouteStats:
        """Return how each version of each target and shadow answered. See `Client.route_stats`."""
        return await self._ask(call.route_stats(name))

    async def examples(
        self,
        classifiers: str | Iterable[str] = "*",
        *,
        since_s: float | None = None,
        is_corrected: bool = True,
        after: str | None = None,
    ) -> Examples:
        """Return a page of the texts that the server keeps, with their labels. See `Client.examples`."""
        return await self._ask(call.examples(classifiers, since_s, is_corrected, after))

    async def ready(self) -> bool:
        """Return whether the server accepts requests now. Never raises. See `Client.ready`."""
        try:
            await self._ask(call.READY)
        except LoraplexError:
            return False
        return True

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Return once the server is ready. After `timeout` seconds, raises the last error. See
        `Client.wait_until_ready`."""
        give_up = self._connection.clock() + timeout
        while True:
            try:
                await self._ask(call.READY)
                return
            except LoraplexError:
                if self._connection.clock() >= give_up:
                    raise
            await self._sleep(POLL_S)

    async def close(self) -> None:
        """Close the connections. Safe to call twice."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, asked: Call[Answer]) -> Answer:
        exchange = Exchange(self._connection, asked)
        while True:
            outcome: Outcome
            try:
                outcome = await self._http.request(**exchange.request())
            except httpx.HTTPError as exc:
                outcome = exc
            delay_s = exchange.delay_s(outcome)
            if delay_s is None:
                return exchange.result(outcome)
            await self._sleep(delay_s)
