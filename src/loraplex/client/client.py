"""`Client`: the client that blocks until the server answers."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, overload

import httpx

from loraplex.client import call
from loraplex.client.call import Answer, Call
from loraplex.client.exchange import POLL_S, Connection, Exchange, Outcome
from loraplex.client.many import Conversation, check, id_and_input, in_threads, progress_bar
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


class Client:
    """Client of a running server.

        with Client("http://127.0.0.1:8000") as client:
            client.classify("Customer: Thanks, that's all!")["issueResolved"].label

    base_url:     default: LORAPLEX_URL, else http://127.0.0.1:8000.
    api_key:      default: LORAPLEX_API_KEY.
    timeout:      seconds to wait for the answer to one attempt; None: no limit. Loading, pinning and unloading adapters
                  never time out.
    max_retries:  further attempts. The waits between them are random and grow. They are not shorter than the server's
                  Retry-After, up to 30 seconds. A request is retried if it did not reach the server, or was refused for
                  now (429, 503). A call that changes nothing is also retried if no answer came, or if a proxy answered
                  502. `rollback_route` is not retried after a 503.
    transport:    an httpx transport to use instead of the default.

    Several threads may call. A server's error is raised as the class of `loraplex.errors` with its code, such as
    UnauthorizedError, NotReadyError or QueueFullError. Its `status` is the HTTP status. ServerError stands for a code
    that is not known here, no answer (`unreachable`), or an answer that is not Loraplex's (`not_loraplex`).
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
        """Raises ConfigurationError if the URL or the key cannot be one. Nothing is sent yet."""
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
        roles: Roles | None = None,
        cascade: bool = True,
    ) -> ClassifyResult:
        """Return one verdict for each classifier, in the order requested. If only some classifiers fail, their verdicts
        hold an `error`.

        input:            text, or messages: `Message`s, or mappings as OpenAI's chat API has them.
        classifiers:      a name, names, or "*" for all. A name is a classifier's or a route's.
        conversation_id:  the same id for every turn of a conversation: the next turn reuses cached work.
        deadline_ms:      milliseconds from this call, retries included. A classifier that is not computed by then has
                          an `error`.
        roles:            role -> the name that a contract writes before its turns, where it differs from the
                          contract's; None leaves the role's turns out.
        cascade:          False runs every classifier, whatever its gate says (`when` in loraplex.yaml).

        Raises a LoraplexError if nothing can be answered: UnknownClassifierError, InvalidRequestError,
        InputTooLongError, DeadlineExceededError, QueueFullError, ….
        """
        return self._ask(call.classify(input, classifiers, conversation_id, deadline_ms, roles, cascade))

    def decide(
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
        """Return an answer to each typed question about a state. A question that is a classifier's or a route's name is
        answered by it, in the contract's own words; other words are told in the answer's `warnings`. If only some
        classifiers fail, their answers hold an `error`.

        state:            text, messages, or any other JSON, which is judged as its compact text.
        questions:        name -> question. A choice has the contract's labels, a score too, in any order.
        model:            "*": the questions' names choose; or one classifier or route that answers all of them.
        conversation_id, deadline_ms, roles, cascade:  as for `classify`.

        Raises a LoraplexError if a question is wrong, before anything is computed, or if nothing can be answered.
        """
        asked = call.decide(state, questions, model, conversation_id, deadline_ms, roles, cascade)
        return self._ask(asked).decisions(questions)

    @overload
    def classify_many(
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
    def classify_many(
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

    def classify_many(
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
        """Call `classify` for each conversation, and return the results in order.

        conversations:  inputs, or pairs (conversation_id, input). A generator is read in this thread, and only as far
                        as calls can be made.
        concurrency:    largest number of calls in flight.
        deadline_ms:    milliseconds for each call, from its start.
        progress:       draw a progress bar on standard error.
        on_error:       "raise" stops at the first error; "return" puts the error in the result's place.

        Ctrl-C stops at once. Calls in flight are neither awaited nor retried.
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
                    return self._ask(call.classify(input, names, conversation_id, deadline_ms, roles, cascade), sleep)
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
        """Record the label that a verdict should have had; a later call replaces the label. Returns the number of
        answers that the label applies to: the verdict's own, and those of its route's shadows. Raises
        UnknownVerdictError if the verdict is unknown or no longer kept, and InvalidRequestError if the classifier has
        no such label."""
        return self._ask(call.feedback(verdict_id, label)).num_answers

    def feedback_on_request(self, request_id: str, label: str, classifier: str | None = None) -> int:
        """Do as `feedback` for a verdict that the caller knows by its request: the X-Amzn-SageMaker-Inference-Id or
        X-Request-ID that was sent. classifier: which verdict, if the request asked several."""
        return self._ask(call.feedback(None, label, request_id, classifier)).num_answers

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """Return all adapters with their states."""
        return self._ask(call.ADAPTERS).adapters

    def skipped(self) -> tuple[SkippedFolder, ...]:
        """Return the bundle's folders that hold an adapter and were left out at the start, with the reasons."""
        return self._ask(call.ADAPTERS).skipped

    def adapter(self, name: str) -> AdapterInfo:
        """Return one adapter. Raises UnknownClassifierError if no adapter has this name."""
        return self._ask(call.adapter(name))

    def load_adapter(self, name: str, source: str | PathLike[str], *, pin: bool | None = None) -> AdapterInfo:
        """Load an adapter, or replace the adapter of this name. Returns when the new version has passed its checks and
        answers requests.

        source:  a path on the server below an adapter root, hf://org/name@revision, or s3://bucket/prefix.
        pin:     keep the adapter in its slot on the device; None leaves this unchanged.

        Raises AdapterError, ContractError or BundleError if the adapter is not valid or cannot be fetched. The old
        version then keeps answering.
        """
        return self._ask(call.load_adapter(name, source, pin))

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter. Returns when its last request is answered and its memory is free. Raises
        UnknownClassifierError if no adapter has this name, and AdapterInUseError if a route uses the adapter."""
        self._ask(call.unload_adapter(name))

    def pin_adapter(self, name: str, is_pinned: bool = True) -> AdapterInfo:
        """Pin or unpin an adapter. A pinned adapter keeps its slot on the device. Raises UnknownClassifierError if no
        adapter has this name, and NotReadyError if other pinned adapters leave no room."""
        return self._ask(call.pin_adapter(name, is_pinned))

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the base, then all routes and adapters."""
        return self._ask(call.MODELS).data

    def routes(self) -> tuple[Route, ...]:
        """Return all routes."""
        return self._ask(call.ROUTES).routes

    def route(self, name: str) -> Route:
        """Return one route. Raises UnknownRouteError if no route has this name."""
        return self._ask(call.route(name))

    def set_route(self, name: str, targets: Mapping[str, float], shadows: Iterable[str] = ()) -> Route:
        """Create or replace a route.

        targets:  adapter -> weight. A target answers in proportion to its weight; one target answers all turns of a
                  conversation.
        shadows:  adapters that answer, too; their verdicts are recorded and never returned.

        Raises UnknownClassifierError if an adapter does not exist. Raises InvalidRequestError if a weight is negative,
        or all weights are 0.
        """
        return self._ask(call.set_route(name, targets, shadows))

    def delete_route(self, name: str) -> None:
        """Delete a route. Raises UnknownRouteError if no route has this name."""
        self._ask(call.delete_route(name))

    def rollback_route(self, name: str) -> Route:
        """Undo the last change of a route, also its deletion. Raises NoRevisionError if there is nothing to undo."""
        return self._ask(call.rollback_route(name))

    def route_stats(self, name: str) -> RouteStats:
        """Return how each version of each target and shadow answered. Raises UnknownRouteError if no route or
        classifier has this name."""
        return self._ask(call.route_stats(name))

    def examples(
        self,
        classifiers: str | Iterable[str] = "*",
        *,
        since_s: float | None = None,
        is_corrected: bool = True,
        after: str | None = None,
    ) -> Examples:
        """Return a page of the texts that the server keeps (`--keep-inputs`), oldest first, with the labels of their
        verdicts.

        classifiers:   names of routes, or of classifiers that were asked by their own; "*" for all.
        since_s:       only requests of the last so many seconds.
        is_corrected:  only labels that feedback gave; False: also what was answered and not corrected.
        after:         the `after` of the page before. A page may be empty; the last one has None.

        Raises UnknownRouteError for an unknown name, and InvalidRequestError if no texts are kept."""
        return self._ask(call.examples(classifiers, since_s, is_corrected, after))

    def ready(self) -> bool:
        """Return whether the server accepts requests now. Never raises: a server that does not answer is not ready."""
        try:
            self._ask(call.READY)
        except LoraplexError:
            return False
        return True

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Return once the server is ready. After `timeout` seconds, raises the last error, such as NotReadyError or
        ServerError."""
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
