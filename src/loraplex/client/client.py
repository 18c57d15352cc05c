"""`Client`: a server, asked and waited for."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from types import TracebackType
from typing import Literal, Self, overload

import httpx

from loraplex.client import call
from loraplex.client.call import Answer, Call
from loraplex.client.exchange import POLL_S, Connection, Exchange, Outcome
from loraplex.client.many import Conversation, check, id_and_input, in_threads, progress_bar
from loraplex.errors import LoraplexError
from loraplex.types import AdapterInfo, ClassifyResult, Input, ModelInfo, Route, RouteStats, classifier_names


class Client:
    """A running server.

        with Client("http://127.0.0.1:8000") as client:
            client.classify("Customer: Thanks, that's all!")["issueResolved"].label

    base_url:     default: LORAPLEX_URL, else http://127.0.0.1:8000.
    api_key:      default: LORAPLEX_API_KEY.
    timeout:      seconds that one attempt may take until its answer; None: as long as it takes. Loading, pinning and
                  unloading adapters always take as long as they take.
    max_retries:  further attempts, after waits that double and are random, and not before the server's Retry-After.
                  Everything is repeated that did not reach the server or that it refused for now (429, 503). What
                  changes nothing is also repeated where an answer did not come, or came from a proxy (502).
    transport:    of httpx, in place of its own.

    Calls may come from several threads. Each raises what the server answered as the class of `loraplex.errors` that has
    its code: UnauthorizedError, NotReadyError, QueueFullError, …, with its `status`. A code that is not known here is a
    ServerError; so is no answer (`unreachable`), and one that is not Loraplex's (`not_loraplex`).
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | None = 30.0,
        max_retries: int = 3,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """ConfigurationError: the URL or the key cannot be one. Nothing is sent yet."""
        self._connection = Connection.to(base_url, api_key, timeout, max_retries)
        self._http = httpx.Client(transport=transport, **self._connection.options())
        self._sleep: Callable[[float], None] = time.sleep

    def classify(
        self,
        input: Input,
        classifiers: str | Iterable[str] = "*",
        *,
        conversation_id: str | None = None,
        deadline_ms: float | None = None,
    ) -> ClassifyResult:
        """One verdict a classifier, in the order asked; one that fails beside others has its `error`.

        input:            text, or messages: `Message`s or mappings with `role` and `content`.
        classifiers:      a name, names, or "*" for all; a name is a classifier's or a route's.
        conversation_id:  keeps what was computed for the conversation's next turn.
        deadline_ms:      from this call, its retries included; a classifier not computed by then has an `error`.
        UnknownClassifierError, InvalidRequestError, InputTooLongError, DeadlineExceededError, QueueFullError, … where
        nothing can be answered.
        """
        return self._ask(call.classify(input, classifiers, conversation_id, deadline_ms))

    @overload
    def classify_many(
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
    def classify_many(
        self,
        conversations: Iterable[Conversation],
        classifiers: str | Iterable[str] = "*",
        *,
        concurrency: int = 8,
        deadline_ms: float | None = None,
        progress: bool = False,
        on_error: Literal["return"],
    ) -> list[ClassifyResult | LoraplexError]: ...

    def classify_many(
        self,
        conversations: Iterable[Conversation],
        classifiers: str | Iterable[str] = "*",
        *,
        concurrency: int = 8,
        deadline_ms: float | None = None,
        progress: bool = False,
        on_error: Literal["raise", "return"] = "raise",
    ) -> list[ClassifyResult] | list[ClassifyResult | LoraplexError]:
        """As `classify` of each, in order.

        conversations:  inputs, or (conversation_id, input). A generator is read in this thread, and never further than
                        calls can be made.
        concurrency:    calls in flight at most.
        deadline_ms:    of each call, from when it is made.
        progress:       draw a bar on standard error.
        on_error:       "raise" ends it at the first error, "return" puts the error in the result's place.
        Ctrl-C ends it at once; what is in flight is neither waited for nor repeated.
        """
        check(conversations, concurrency)
        names = classifier_names(classifiers)
        ended = threading.Event()

        def sleep(seconds: float) -> None:
            if ended.wait(seconds):
                raise InterruptedError("nobody waits for the answer")

        with progress_bar(conversations, progress) as advance:

            def classify(conversation: Conversation) -> ClassifyResult | LoraplexError:
                try:
                    conversation_id, input = id_and_input(conversation)
                    return self._ask(call.classify(input, names, conversation_id, deadline_ms), sleep)
                except LoraplexError as exc:
                    if on_error == "raise":
                        raise
                    return exc
                finally:
                    advance()

            try:
                return in_threads(classify, conversations, concurrency)
            finally:
                ended.set()

    def feedback(self, verdict_id: str, label: str) -> int:
        """Say what a verdict's label should have been; the last word counts. Returns the number of answers that this
        judges: the verdict's own and its route's shadows'. UnknownVerdictError: it is not remembered, or not any more.
        InvalidRequestError: the classifier has no such label."""
        return self._ask(call.feedback(verdict_id, label)).num_answers

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """All adapters with their states."""
        return self._ask(call.ADAPTERS).adapters

    def adapter(self, name: str) -> AdapterInfo:
        """UnknownClassifierError: there is none of that name."""
        return self._ask(call.adapter(name))

    def load_adapter(self, name: str, source: str | PathLike[str], *, pin: bool | None = None) -> AdapterInfo:
        """Load what `source` holds now, or replace what has the name; returns when it is proven and live.

        source:  a path on the server below an adapter root, hf://org/name@revision, or s3://bucket/prefix.
        pin:     keep its place on the device; None: as it was.
        AdapterError, ContractError, BundleError: it is not sound, or cannot be had; what answered before goes on.
        """
        return self._ask(call.load_adapter(name, source, pin))

    def unload_adapter(self, name: str) -> None:
        """Returns when its last request is answered and its memory is free. UnknownClassifierError; AdapterInUseError:
        a route leads to it."""
        self._ask(call.unload_adapter(name))

    def pin_adapter(self, name: str, is_pinned: bool = True) -> AdapterInfo:
        """A pinned adapter keeps its place on the device. UnknownClassifierError; NotReadyError: other pinned adapters
        leave no room."""
        return self._ask(call.pin_adapter(name, is_pinned))

    def models(self) -> tuple[ModelInfo, ...]:
        """The base, then all that can be named besides."""
        return self._ask(call.MODELS).data

    def routes(self) -> tuple[Route, ...]:
        """All routes."""
        return self._ask(call.ROUTES).routes

    def route(self, name: str) -> Route:
        """UnknownRouteError: there is none of that name."""
        return self._ask(call.route(name))

    def set_route(self, name: str, targets: Mapping[str, float], shadows: Iterable[str] = ()) -> Route:
        """Make or change a route: `targets` (adapter -> weight) answer in proportion, one and the same for all turns of
        a conversation; each of `shadows` judges too, without being returned. UnknownClassifierError: no adapter of that
        name. InvalidRequestError: a weight is negative, or all are 0."""
        return self._ask(call.set_route(name, targets, shadows))

    def delete_route(self, name: str) -> None:
        """UnknownRouteError: there is none of that name."""
        self._ask(call.delete_route(name))

    def rollback_route(self, name: str) -> Route:
        """Undo its last change, its deletion too. NoRevisionError: there is nothing to undo."""
        return self._ask(call.rollback_route(name))

    def route_stats(self, name: str) -> RouteStats:
        """How each version of each target and shadow answered. UnknownRouteError: there is none of that name."""
        return self._ask(call.route_stats(name))

    def ready(self) -> bool:
        """Whether it answers requests now. Never raises: who does not answer is not ready."""
        try:
            self._ask(call.READY)
        except LoraplexError:
            return False
        return True

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Returns as soon as it is ready. After `timeout` seconds NotReadyError or ServerError says why it is not."""
        give_up = self._connection.clock() + timeout
        while True:
            try:
                self._ask(call.READY)
                return
            except LoraplexError:
                if self._connection.clock() >= give_up:
                    raise
            self._sleep(POLL_S)

    def close(self) -> None:
        """Close the connections. Safe to call twice."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, asked: Call[Answer], sleep: Callable[[float], None] | None = None) -> Answer:
        exchange = Exchange(self._connection, asked)
        while True:
            outcome: Outcome
            try:
                outcome = self._http.request(**exchange.request())
            except httpx.HTTPError as exc:
                outcome = exc
            delay_s = exchange.delay_s(outcome)
            if delay_s is None:
                return exchange.result(outcome)
            (sleep or self._sleep)(delay_s)
