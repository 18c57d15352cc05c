"""Sits between the server and the service: resolves names to adapters, queues shadows, and logs verdicts. Knows nothing
of HTTP."""

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from loraplex.bundle import check_name, check_routes
from loraplex.cascades import Gate
from loraplex.classifier import valid_unicode
from loraplex.config import RouteSettings
from loraplex.database import state_errors
from loraplex.errors import (
    AdapterInUseError,
    ConfigurationError,
    InvalidRequestError,
    LoraplexError,
    OverloadedError,
    RefusedError,
    UnknownClassifierError,
    UnknownRouteError,
    UnknownVerdictError,
    listed,
    quoted,
)
from loraplex.routing import passes
from loraplex.routing.draw import choose
from loraplex.routing.feedback_label import as_spelled
from loraplex.routing.route_store import RouteStore
from loraplex.routing.shadows import Shadow, Shadows
from loraplex.routing.verdict_log import LoggedVerdict, VerdictLog
from loraplex.types import ClassifyRequest, ClassifyResult, ErrorInfo, Examples, Names, Route, RouteStats, Verdict

if TYPE_CHECKING:  # the service imports torch
    from loraplex.service.service import Service

logger = logging.getLogger(__name__)

FLUSH_EVERY_S = 1.0
MOST_SENT_AGAIN = 16  # verdicts of one classifier under one request id; more mean that ids are not unique
Result = TypeVar("Result")


class Router:
    """Resolves routes in front of the service, which it owns and closes. A route's name hides an adapter of the same
    name; targets are always adapters. Call all methods from one event loop."""

    def __init__(
        self,
        service: "Service",
        from_file: Mapping[str, RouteSettings],
        store: RouteStore | None = None,
        log: VerdictLog | None = None,
        gates: Mapping[str, Gate] | None = None,
    ) -> None:
        """from_file, gates: the routes and gates of the bundle's `loraplex.yaml`. log: None keeps no verdicts."""
        self._gates = gates or {}
        self.service, self._from_file, self._store, self._log = service, from_file, store or RouteStore(), log
        self._routes: dict[str, Route] = {}
        self._targeted: frozenset[str] = frozenset()  # names of routes, and adapters that a route uses
        self._shadows = Shadows(service, self._log_shadows)
        self._flusher: asyncio.Task[None] | None = None
        self._is_closed = False
        self._changing = asyncio.Lock()  # guards the routes, and the existence of their adapters
        self._files = ThreadPoolExecutor(1, "loraplex-routing")  # disk access, off the event loop

    async def start(self) -> None:
        """Read the routes and start the background tasks. Raises BundleError if a route of `loraplex.yaml` has a name
        that is not valid, or an unknown target, and StateError if the stored routes cannot be read."""
        check_routes(self._from_file, self.service.base_names, self.service.knows)
        await self._in_files(self._store.read_file, self._from_file)
        await self._reload()
        for route in self._routes.values():
            for target in (*route.targets, *route.shadows):
                if not self.service.knows(target):
                    logger.error("the route %s uses the adapter %s, which does not exist", route.name, target)
        for name in self.service.base_names:
            if name in self._routes:
                logger.error("the route %s hides the base, which has the same name", name)
        self._shadows.start()
        if self._log is not None:
            self._flusher = asyncio.create_task(self._flush_for_ever())

    async def close(self) -> None:
        """Finish all accepted requests except shadows, then close the service. Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._shadows.close()
        if self._flusher is not None:
            self._flusher.cancel()
            self._flusher = None
        await self.service.close()
        if self._log is not None:
            await self._in_files(self._log.close)
        self._files.shutdown(wait=False)

    # ------------------------------------------------------------------------------------------- routes

    def routes(self) -> tuple[Route, ...]:
        return tuple(self._routes.values())

    def route(self, name: str) -> Route:
        """Return the route. Raises UnknownRouteError if there is none."""
        if name not in self._routes:
            raise UnknownRouteError(name)
        return self._routes[name]

    def knows(self, name: str) -> bool:
        """Return whether a route or an adapter has this name."""
        return name in self._routes or self.service.knows(name)

    def routes_to(self, adapter: str) -> list[str]:
        """Return the names of the routes that have `adapter` as a target or a shadow."""
        return [one.name for one in self._routes.values() if adapter in one.targets or adapter in one.shadows]

    async def set_route(self, name: str, settings: RouteSettings) -> Route:
        """Create or replace a route. The route is stored and in effect when this returns. Raises RefusedError if the
        name or a target is not valid, InvalidRequestError for the base's name and for a route as target, and StateError
        if the file cannot be written."""
        try:
            check_name(name, "route")
        except ConfigurationError as exc:
            raise RefusedError(exc) from None
        if name in self.service.base_names:
            raise InvalidRequestError(f"{name!r} is the base's name", remedy="choose another name for the route")
        async with self._changing:
            self._check_targets((*settings.targets, *settings.shadows))
            with _unchanged(name):
                route = await self._in_files(self._store.put, name, settings)
            with _saved(name):
                await self._reload()
        return route

    async def delete_route(self, name: str) -> None:
        """Delete a route. Raises UnknownRouteError if there is none, and StateError if the file cannot be written."""
        async with self._changing:
            with _unchanged(name):
                await self._in_files(self._store.delete, name)
            with _saved(name):
                await self._reload()

    async def rollback_route(self, name: str) -> Route:
        """Undo the last change of a route. Raises NoRevisionError if there is nothing to restore, RefusedError if a
        target of the restored route no longer exists, and StateError if the file cannot be written."""
        async with self._changing:
            with _unchanged(name):
                before = await self._in_files(self._store.before, name)
                self._check_targets((*before.targets, *before.shadows))
                route = await self._in_files(self._store.rollback, name)
            with _saved(name):
                await self._reload()
        return route

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter; see `Service.unload_adapter`. Raises AdapterInUseError if a route uses the adapter."""
        async with self._changing:
            if routes := self.routes_to(name):
                raise AdapterInUseError(name, routes)
            unloading = self.service.unload_adapter(name)  # from here on the name is unknown
        await unloading

    def _check_targets(self, targets: Iterable[str]) -> None:
        for target in targets:
            if not self.service.knows(target):
                if route := self._routes.get(target):
                    raise InvalidRequestError(
                        f"{target!r} is a route, and routes lead to adapters only",
                        remedy=f"use the adapters that it leads to: {listed([*route.targets])}",
                    )
                raise RefusedError(UnknownClassifierError(target, list(self.service.names())))

    # ------------------------------------------------------------------------------------------- requests

    def resolve(self, name: str, conversation_id: str | None = None) -> str:
        """Return the adapter that answers for `name`. All turns of a conversation get the same adapter."""
        route = self._routes.get(name)
        return name if route is None else choose(route, conversation_id)

    def targets(self, name: str) -> tuple[str, ...]:
        """Return the adapters of which one answers for `name`."""
        route = self._routes.get(name)
        return (name,) if route is None else tuple(one for one, weight in route.targets.items() if weight)

    def asked(self, names: Names) -> tuple[str, ...]:
        """Return the requested names. `"*"` means every route, and every classifier that no route uses."""
        if names != "*":
            return names
        return (*self._routes, *(name for name in self.service.names() if name not in self._targeted))

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        """Classify as `Service.classify` does. Each verdict has the name that was requested, and an id for feedback.
        The bare base answers the questions, also one that has a classifier's name by now."""
        adapters, routes = self._adapters(request), self._routes
        try:
            result = await passes.classify(self.service, request, adapters, self._gates, self.resolve)
        except LoraplexError as exc:
            if not isinstance(exc, OverloadedError):  # an overload says nothing about the targets
                self._log_failure(adapters, exc)
            raise
        if self._log is not None:
            if self._log.inputs is not None:
                self._log.inputs.add(result.id, request)
            total_ms = result.timings.total_ms
            targets = [*adapters.values(), *(self.service.base_name for _ in request.questions)]
            logged = (
                LoggedVerdict.of(
                    verdict,
                    verdict.id or "",
                    verdict.classifier,
                    adapter,
                    total_ms,
                    request_id=request.request_id,
                    key=request.key,
                )
                for verdict, adapter in zip(result.verdicts, targets, strict=True)
                if verdict.skipped_by is None
            )
            # Log once the answer is on its way, before the loop's next request.
            asyncio.get_running_loop().call_soon(self._log.add, logged)
            self._ask_shadows(request, result.verdicts, adapters, routes)
        return result

    async def show_prompt(self, request: ClassifyRequest) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Return (requested name, prompt, token ids) for each classifier and question; see `Service.show_prompt`."""
        adapters = self._adapters(request)
        shown = await self.service.show_prompt(replace(request, classifiers=tuple(adapters.values())))
        prompts = {adapter: (text, token_ids) for adapter, text, token_ids in shown}
        of_questions = [one for one in shown if one[0] in request.questions]
        return (*((name, *prompts[adapter]) for name, adapter in adapters.items()), *of_questions)

    def _adapters(self, request: ClassifyRequest) -> dict[str, str]:
        """Return requested name -> adapter."""
        return {name: self.resolve(name, request.conversation_id) for name in self.asked(request.classifiers)}

    def _ask_shadows(
        self,
        request: ClassifyRequest,
        verdicts: Seq[Verdict],
        adapters: Mapping[str, str],
        routes: Mapping[str, Route],
    ) -> None:
        """Queue one request for all shadows of `verdicts`. `routes` are the routes from when the verdicts were
        requested."""
        of: dict[str, tuple[tuple[str, str], ...]] = {}
        for verdict in verdicts:
            name = verdict.classifier
            for shadow in routes[name].shadows if name in routes and verdict.skipped_by is None else ():
                if shadow != adapters[name]:
                    of[shadow] = (*of.get(shadow, ()), (verdict.id or "", name))
        if of:
            self._shadows.add(
                Shadow(request=replace(request, classifiers=tuple(of), questions={}, deadline_ms=None), of=of)
            )

    # ------------------------------------------------------------------------------------------- verdicts

    async def stats(self, name: str) -> RouteStats:
        """Return the statistics of a route, or of a classifier or a question that is requested by its own name. Raises
        UnknownRouteError for an unknown name, InvalidRequestError if no verdicts are kept, and StateError if the file
        cannot be read."""
        log = await self._log_of((name,))
        with state_errors("the verdicts cannot be read"):
            return await self._in_files(log.stats, name)

    async def set_truth(self, verdict_id: str, label: str) -> int:
        """Record the label that a verdict should have had; a later call replaces the label. Returns the number of
        answers that the label applies to. Raises UnknownVerdictError for an unknown id, InvalidRequestError if
        the classifier has no such label or no verdicts are kept, and StateError if the file cannot be written."""
        log = await self._kept()
        valid_unicode(verdict_id + label)
        with state_errors("the label is not recorded"):
            label = as_spelled(label, await self._in_files(log.targets_of, verdict_id), self.service)
            return await self._in_files(log.set_truth, verdict_id, label)

    async def set_truth_of_request(
        self, request_id: str, classifier: str | None, label: str, key: str | None = None
    ) -> int:
        """Do as `set_truth` for a request's verdict by `classifier`, which may be None if the request asked only one.
        key: name of the API key that asked; None finds every key's requests. A request that was sent again has several
        verdicts; the label applies to all of them."""
        log = await self._kept()
        valid_unicode(request_id + (classifier or "") + label)
        with state_errors("the label is not recorded"):
            answers = await self._in_files(log.answers_to, request_id, key)
            if classifier is None and len(answers) > 1:
                raise InvalidRequestError(
                    f"the request {quoted(request_id)} asked several classifiers: {listed(sorted(answers))}",
                    remedy="name one of them: `classifier`",
                )
            name = next(iter(answers), "") if classifier is None else classifier
            if name not in answers:
                by = "" if classifier is None else f" by {quoted(classifier)}"
                raise UnknownVerdictError(f"of the request {quoted(request_id)}{by}")
            num_verdicts, targets = answers[name]
            if num_verdicts > MOST_SENT_AGAIN:
                raise InvalidRequestError(
                    f"the id {quoted(request_id)} has {num_verdicts} verdicts of {name!r}",
                    remedy="give each request an id of its own, or name a verdict: `verdict_id`",
                )
            label = as_spelled(label, targets, self.service)
            return await self._in_files(log.set_truth_of_request, request_id, key, name, label)

    async def examples(self, names: Names, since_s: float | None, is_corrected: bool, after: str | None) -> Examples:
        """Return kept texts with their labels; see `VerdictLog.examples`. Raises UnknownRouteError for an unknown name,
        InvalidRequestError if no texts are kept, and StateError if the files cannot be read."""
        log = await self._log_of(() if names == "*" else names)
        if log.inputs is None:
            raise InvalidRequestError("no texts are kept", remedy="start the server with --keep-inputs, such as 7d")
        with state_errors("the texts cannot be read"):
            return await self._in_files(log.examples, names, since_s, is_corrected, after)

    @property
    def keeps_inputs(self) -> str | None:
        """For how long texts are kept, such as 7d; None if they are not."""
        return None if self._log is None or self._log.inputs is None else self._log.inputs.keep

    def num_shadows_shed(self) -> int:
        return self._shadows.num_shed

    async def _kept(self) -> VerdictLog:
        """Return the log, with all earlier answers in it. Raises InvalidRequestError if no verdicts are kept."""
        await asyncio.sleep(0)
        if self._log is None:
            raise InvalidRequestError("no verdicts are kept", remedy="start the server with --keep-verdicts above 0")
        return self._log

    async def _log_of(self, names: Iterable[str]) -> VerdictLog:
        """Return the log. Raises UnknownRouteError for a name that is nobody's and has no verdicts."""
        unknown = [name for name in names if not self.knows(name)]
        if unknown and self._log is None:
            raise UnknownRouteError(unknown[0])
        log = await self._kept()
        with state_errors("the verdicts cannot be read"):
            for name in unknown:  # such as a question's, which the bare base answered
                if not await self._in_files(log.knows, valid_unicode(name)):
                    raise UnknownRouteError(name)
        return log

    def _log_failure(self, adapters: Mapping[str, str], error: LoraplexError) -> None:
        """Log a failure for each known target of a request that got no answer."""
        if self._log is not None:
            known = {name: adapter for name, adapter in adapters.items() if self.service.knows(adapter)}
            failed = Verdict(classifier="", error=ErrorInfo.of(error))
            self._log.add(
                LoggedVerdict.of(failed, uuid.uuid4().hex, name, adapter, None) for name, adapter in known.items()
            )

    def _log_shadows(self, shadow: Shadow, answer: ClassifyResult | LoraplexError) -> None:
        assert self._log is not None, "shadows run only to be logged"
        if isinstance(answer, LoraplexError):
            failed = Verdict(classifier="", error=ErrorInfo.of(answer))
            verdicts, total_ms = dict.fromkeys(shadow.of, failed), None
        else:
            verdicts = {verdict.classifier: verdict for verdict in answer.verdicts}
            total_ms = answer.timings.total_ms
        self._log.add(
            LoggedVerdict.of(verdicts[adapter], verdict_id, route, adapter, total_ms, is_shadow=True)
            for adapter, shadowed in shadow.of.items()
            for verdict_id, route in shadowed
        )

    # ------------------------------------------------------------------------------------------- state

    async def _reload(self) -> None:
        self._routes = await self._in_files(self._store.routes)
        targeted = (adapter for one in self._routes.values() for adapter in (*one.targets, *one.shadows))
        self._targeted = frozenset((*self._routes, *targeted))

    async def _in_files(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._files, partial(work, *arguments))

    async def _flush_for_ever(self) -> None:
        assert self._log is not None
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            await self._in_files(self._log.try_to_flush)


def _unchanged(route: str) -> AbstractContextManager[None]:
    return state_errors(f"the route {route!r} is not changed")


def _saved(route: str) -> AbstractContextManager[None]:
    return state_errors(
        f"the change of the route {route!r} is saved, and takes effect at a restart or with the next one"
    )
