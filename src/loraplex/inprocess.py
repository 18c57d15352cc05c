"""`Loraplex`: serves a bundle inside the caller's own process, without HTTP and without asyncio."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from loraplex.bundle import Bundle, open_bundle
from loraplex.config import EngineConfig, resolve
from loraplex.decisions import Decisions
from loraplex.discovery import SkippedFolder
from loraplex.errors import NotReadyError
from loraplex.generation import GenerateRequest, GenerateResult
from loraplex.messages import conversation_of, prompt_of
from loraplex.questions import check_deadline, given_questions, given_state
from loraplex.routing.questions import Asked, plan
from loraplex.routing.router import Router
from loraplex.routing.start import start_router
from loraplex.service.named_adapters import add_adapters
from loraplex.service.preparation import Preparation, check_effects, prepare
from loraplex.types import (
    AdapterInfo,
    ClassifyRequest,
    ClassifyResult,
    Input,
    Question,
    Roles,
    classifier_names,
)

if TYPE_CHECKING:  # it imports torch
    from loraplex.service.service import Service

Result = TypeVar("Result")


class Loraplex:
    """The classifiers of a bundle, served in the caller's process.

        with Loraplex.load("bundle") as loraplex:
            loraplex.classify("Customer: Thanks, that's all!")["issueResolved"].label

    Calls may come from several threads; they share the engine's batches.
    """

    def __init__(self, start: Callable[[], Coroutine[Any, Any, Router]]) -> None:
        """start: makes the router, on this object's event loop. Callers use `load` instead."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loraplex-loop", daemon=True)
        self._thread.start()
        self._closed = False
        self._closing = threading.Lock()  # held while `_closed` is read and acted on
        try:
            self._router = self.run(start())
        except BaseException:
            self._closed = True
            self._stop()
            raise

    @classmethod
    def load(cls, path: str | Path, *, adapters: Mapping[str, str | Path] | None = None, **engine: Any) -> Self:
        """Load the bundle (or base) at `path`. Raises ConfigurationError, which names the file or setting at fault.

        adapters:  name -> source, besides those of the bundle: a folder or an archive, an id on the hub, hf://… or s3://….
        engine:    fields of EngineConfig, such as device="cpu" or dtype="float32"."""
        bundle = open_bundle(path)
        config = resolve(EngineConfig, bundle.settings.engine, engine)
        check_effects(config, [name for name, value in engine.items() if value is not None])
        bundle = add_adapters(bundle, adapters or {}, config)
        return cls.start(bundle, config, prepare(bundle, config))

    @classmethod
    def start(cls, bundle: Bundle, config: EngineConfig, preparation: Preparation) -> Self:
        """Load a bundle that is prepared: `load` does this, and the preparation, too."""
        from loraplex.service.start import start

        async def start_all() -> Router:
            service = await start(bundle, config, preparation=preparation)
            return await start_router(service, bundle.settings.routes, gates=bundle.settings.gates)

        return cls(start_all)

    @property
    def router(self) -> Router:
        """The router in front of `service`. Pass its coroutines to `run`."""
        return self._router

    @property
    def service(self) -> "Service":
        """The service that answers. Pass its coroutines to `run`."""
        return self._router.service

    def classify(
        self,
        input: Input,
        classifiers: str | Iterable[str] = "*",
        *,
        deadline_ms: float | None = None,
        conversation_id: str | None = None,
        roles: Roles | None = None,
        cascade: bool = True,
    ) -> ClassifyResult:
        """Return one verdict for each classifier.

        input:            text, or messages: `Message`s, or mappings as OpenAI's chat API has them.
        classifiers:      a name, names, or "*" for all.
        deadline_ms:      milliseconds from the call; a classifier not computed by then answers `deadline_exceeded`.
        conversation_id:  keeps what was computed for the conversation's next turn.
        roles:            role -> the name that a contract writes before its turns, where it differs from the
                          contract's; None leaves the role's turns out.
        cascade:          False runs every classifier, whatever its gate says (`when` in loraplex.yaml).
        Raises UnknownClassifierError, InvalidRequestError, InputTooLongError and others where no classifier answers."""
        check_deadline(deadline_ms)
        return self.run(
            self._router.classify(
                ClassifyRequest(
                    input=conversation_of(input),
                    classifiers=classifier_names(classifiers),
                    deadline_ms=deadline_ms,
                    conversation_id=conversation_id,
                    roles=roles,
                    cascade=cascade,
                )
            )
        )

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
        """Return an answer to each typed question about a state: what `Client.decide` does, without HTTP."""
        check_deadline(deadline_ms)
        judged = given_state(state)
        asked = [
            Asked(place=f"questions.{name}", options="labels", name=name, question=one)
            for name, one in given_questions(questions).items()
        ]

        async def answer() -> Decisions:
            made = await plan(self._router, asked, judged, field="state", model=model, roles=roles)
            result = await self._router.classify(
                replace(made.request, deadline_ms=deadline_ms, conversation_id=conversation_id, cascade=cascade)
            )
            return Decisions(answers=dict(zip(questions, made.answers(result), strict=True)), usage=result.usage)

        return self.run(answer())

    def generate(self, prompt: Input | Iterable[int], adapter: str | None = None, **sampling: Any) -> GenerateResult:
        """Return the tokens that follow `prompt` under an adapter, or under the bare base where `adapter` is None.

        prompt:    text, token ids, or messages as for `classify`.
        sampling:  the other fields of GenerateRequest, such as max_tokens, temperature, top_p, seed or stop."""
        return self.run(self.service.generate(GenerateRequest(prompt=prompt_of(prompt), adapter=adapter, **sampling)))

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """Return all known adapters, in the order in which they were added."""
        return self.service.adapters()

    def skipped(self) -> tuple[SkippedFolder, ...]:
        """Return the bundle's folders that hold an adapter and were left out at the start, with the reasons."""
        return self.service.skipped()

    def load_adapter(self, name: str, source: str | Path, *, pin: bool | None = None) -> AdapterInfo:
        """Load what `source` holds now as `name`. Replaces an adapter of that name. Other calls are answered meanwhile.
        See `Service.load_adapter`."""
        return self.run(self.service.load_adapter(name, str(source), pin=pin))

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter. Returns when its last request is answered and its memory is free."""
        self.run(self._router.unload_adapter(name))

    def pin_adapter(self, name: str, is_pinned: bool = True) -> AdapterInfo:
        """Pin or unpin an adapter. A pinned adapter keeps its slot on the device."""
        return self.run(self.service.pin_adapter(name, is_pinned))

    def show_prompt(self, request: ClassifyRequest) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Return (name, prompt, token ids) for each classifier and each question of the request."""
        return self.run(self._router.show_prompt(request))

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine, such as one of `service`'s, on this object's event loop. Raises NotReadyError once
        closed."""
        with self._closing:
            if self._closed:
                coroutine.close()
                raise NotReadyError("this Loraplex is closed", remedy="load it again")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # the caller was interrupted: nobody waits for the answer
            raise

    def close(self) -> None:
        """Finish the calls of other threads, then free the model. Safe to call twice."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        try:
            asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()
        finally:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _drain(self) -> None:
        await self._router.close()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        if calls:
            await asyncio.wait(calls)
        await self._loop.shutdown_default_executor()
