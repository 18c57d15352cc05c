"""`AsyncClient`: `Client`, for asyncio."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from os import PathLike
from types import TracebackType
from typing import Literal, Self, overload

import httpx

from loraplex.client import call
from loraplex.client.call import Answer, Call
from loraplex.client.exchange import POLL_S, Connection, Exchange, Outcome
from loraplex.client.many import Conversation, check, id_and_input, in_tasks, progress_bar
from loraplex.errors import LoraplexError
from loraplex.types import AdapterInfo, ClassifyResult, Input, ModelInfo, Route, RouteStats, classifier_names


class AsyncClient:
    """A running server, without a thread that waits for it.

        async with AsyncClient("http://127.0.0.1:8000") as client:
            (await client.classify("Customer: Thanks, that's all!"))["issueResolved"].label

    Arguments, answers, errors and what is sent again are those of `Client`. A call that is cancelled closes its
    connection, and the server drops its work.
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
        """As `Client`."""
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
    ) -> ClassifyResult:
        """As `Client.classify`: one verdict a classifier, in the order asked."""
        return await self._ask(call.classify(input, classifiers, conversation_id, deadline_ms))

    @overload
    async def classify_many(
        self,
        conversations: Iterable[Conversation],
        classifiers: str | Iterable[str] = "*",
        *,
        concurrency: int = 8,
        deadline_ms: float | None = None,
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
        progress: bool = False,
        on_error: Literal["raise", "return"] = "raise",
    ) -> list[ClassifyResult] | list[ClassifyResult | LoraplexError]:
        """As `Client.classify_many`: the results in order. A generator is read on the event loop, so it should not wait
        for anything. The first error, where it is raised, and cancellation cancel what is in flight."""
        check(conversations, concurrency)
        names = classifier_names(classifiers)
        with progress_bar(conversations, progress) as advance:

            async def classify(conversation: Conversation) -> ClassifyResult | LoraplexError:
                try:
                    conversation_id, input = id_and_input(conversation)
                    return await self._ask(call.classify(input, names, conversation_id, deadline_ms))
                except LoraplexError as exc:
                    if on_error == "raise":
                        raise
                    return exc
                finally:
                    advance()

            return await in_tasks(classify, conversations, concurrency)

    async def feedback(self, verdict_id: str, label: str) -> int:
        """As `Client.feedback`: the number of answers that the label judges."""
        return (await self._ask(call.feedback(verdict_id, label))).num_answers

    async def adapters(self) -> tuple[AdapterInfo, ...]:
        """All adapters with their states."""
        return (await self._ask(call.ADAPTERS)).adapters

    async def adapter(self, name: str) -> AdapterInfo:
        """UnknownClassifierError: there is none of that name."""
        return await self._ask(call.adapter(name))

    async def load_adapter(self, name: str, source: str | PathLike[str], *, pin: bool | None = None) -> AdapterInfo:
        """As `Client.load_adapter`: returns when it is proven and live."""
        return await self._ask(call.load_adapter(name, source, pin))

    async def unload_adapter(self, name: str) -> None:
        """As `Client.unload_adapter`: returns when its last request is answered and its memory is free."""
        await self._ask(call.unload_adapter(name))

    async def pin_adapter(self, name: str, is_pinned: bool = True) -> AdapterInfo:
        """As `Client.pin_adapter`: a pinned adapter keeps its place on the device."""
        return await self._ask(call.pin_adapter(name, is_pinned))

    async def models(self) -> tuple[ModelInfo, ...]:
        """The base, then all that can be named besides."""
        return (await self._ask(call.MODELS)).data

    async def routes(self) -> tuple[Route, ...]:
        """All routes."""
        return (await self._ask(call.ROUTES)).routes

    async def route(self, name: str) -> Route:
        """UnknownRouteError: there is none of that name."""
        return await self._ask(call.route(name))

    async def set_route(self, name: str, targets: Mapping[str, float], shadows: Iterable[str] = ()) -> Route:
        """As `Client.set_route`: make or change a route."""
        return await self._ask(call.set_route(name, targets, shadows))

    async def delete_route(self, name: str) -> None:
        """UnknownRouteError: there is none of that name."""
        await self._ask(call.delete_route(name))

    async def rollback_route(self, name: str) -> Route:
        """As `Client.rollback_route`: undo its last change, its deletion too."""
        return await self._ask(call.rollback_route(name))

    async def route_stats(self, name: str) -> RouteStats:
        """As `Client.route_stats`: how each version of each target and shadow answered."""
        return await self._ask(call.route_stats(name))

    async def ready(self) -> bool:
        """As `Client.ready`: whether it answers requests now; never raises."""
        try:
            await self._ask(call.READY)
        except LoraplexError:
            return False
        return True

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """As `Client.wait_until_ready`: after `timeout` seconds NotReadyError or ServerError."""
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
