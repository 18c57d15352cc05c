"""`Loraplex`: a bundle served inside the caller's own process, without HTTP and without asyncio."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from loraplex.bundle import open_bundle
from loraplex.config import EngineConfig, resolve
from loraplex.errors import NotReadyError
from loraplex.routing.router import Router, start_router
from loraplex.types import (
    AdapterInfo,
    ClassifyRequest,
    ClassifyResult,
    GenerateRequest,
    GenerateResult,
    Input,
    Message,
    classifier_names,
    conversation_of,
)

if TYPE_CHECKING:  # it imports torch
    from loraplex.service.service import Service

Result = TypeVar("Result")


class Loraplex:
    """Judge conversations by all classifiers of a bundle.

        with Loraplex.load("bundle") as loraplex:
            loraplex.classify("Customer: Thanks, that's all!")["issueResolved"].label

    Calls may come from several threads; they share the engine's batches.
    """

    def __init__(self, start: Callable[[], Coroutine[Any, Any, Router]]) -> None:
        """start: makes the router, on this object's event loop. See `load`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loraplex-loop", daemon=True)
        self._thread.start()
        self._closed = False
        self._closing = threading.Lock()  # held to look at `_closed` and act on it
        try:
            self._router = self._call(start())
        except BaseException:
            self._closed = True
            self._stop()
            raise

    @classmethod
    def load(cls, path: str | Path, *, adapters: Mapping[str, str | Path] | None = None, **engine: Any) -> Self:
        """Open the bundle (or base) at `path` with `adapters` (name -> folder) besides. `engine`: fields of
        EngineConfig, such as device="cpu" or dtype="float32". ConfigurationError names what is wrong on disk."""
        from loraplex.service.start import start

        bundle = open_bundle(path, adapters)
        config = resolve(EngineConfig, bundle.settings.engine, engine)

        async def start_all() -> Router:
            return await start_router(await start(bundle, config), bundle.settings.routes)

        return cls(start_all)

    @property
    def service(self) -> "Service":
        """What answers. Its methods are coroutines of this object's event loop."""
        return self._router.service

    def classify(
        self,
        input: Input,
        classifiers: str | Iterable[str] = "*",
        *,
        deadline_ms: float | None = None,
        conversation_id: str | None = None,
    ) -> ClassifyResult:
        """One verdict a classifier. input: text, or messages with `role` and `content`. classifiers: a name, names, or
        "*" for all. conversation_id: keeps what was computed for the conversation's next turn.
        UnknownClassifierError, InvalidRequestError, InputTooLongError, … where nothing can be answered."""
        return self._call(
            self._router.classify(
                ClassifyRequest(
                    input=conversation_of(input),
                    classifiers=classifier_names(classifiers),
                    deadline_ms=deadline_ms,
                    conversation_id=conversation_id,
                )
            )
        )

    def generate(
        self, prompt: str | tuple[int, ...] | tuple[Message, ...], adapter: str | None = None, **sampling: Any
    ) -> GenerateResult:
        """The tokens that follow `prompt` under an adapter or the bare base. `sampling`: the other fields of
        GenerateRequest, such as max_tokens, temperature, top_p, seed, stop, num_top, deadline_ms."""
        return self._call(self.service.generate(GenerateRequest(prompt=prompt, adapter=adapter, **sampling)))

    def adapters(self) -> tuple[AdapterInfo, ...]:
        return self.service.adapters()

    def load_adapter(self, name: str, source: str | Path, *, pin: bool | None = None) -> AdapterInfo:
        """Load what `source` holds now as `name`, or in place of what has the name, while others are answered. See
        `Service.load_adapter`."""
        return self._call(self.service.load_adapter(name, str(source), pin=pin))

    def unload_adapter(self, name: str) -> None:
        """Returns when its last request is answered and its memory is free."""
        self._call(self._router.unload_adapter(name))

    def pin_adapter(self, name: str, is_pinned: bool = True) -> AdapterInfo:
        """A pinned adapter keeps its place on the device."""
        return self._call(self.service.pin_adapter(name, is_pinned))

    def show_prompt(self, request: ClassifyRequest) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """(classifier, prompt, token ids) for each classifier of the request."""
        return self._call(self._router.show_prompt(request))

    def close(self) -> None:
        """Answer what other threads asked by now, then free the model. Safe to call twice."""
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

    def _call(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
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
