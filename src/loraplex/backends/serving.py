"""The Backend protocol over any executor: names, leases, questions and verdicts, text, adapters, admission."""

import asyncio
import contextlib
import importlib.util
import logging
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from loraplex.adapters.host import HostTier
from loraplex.adapters.slots import SlotTable
from loraplex.adapters.state import AdapterState
from loraplex.adapters.store import AdapterStore
from loraplex.adapters.version import Lease
from loraplex.adapters.weights import AdapterWeights
from loraplex.backends.admission import Admission
from loraplex.backends.base import GeneratedToken, GenerateRequest, GenerateResult, OnToken
from loraplex.backends.classifiers import ClassifierReader, LoadedClassifier
from loraplex.backends.completion import Completion
from loraplex.backends.executor import Computation, Executor
from loraplex.backends.proof import prove
from loraplex.backends.question import Question, render
from loraplex.backends.registry import BUNDLE, AdapterRegistry, preloaded
from loraplex.backends.tokenizing import LONG_CHARS, TokenizerThreads
from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterSource, Bundle
from loraplex.classifier import valid_unicode
from loraplex.config import EngineConfig, resolve
from loraplex.engine.engine import Steps
from loraplex.engine.sequence import NO_ADAPTER, EngineRequest, Outcome, Sequence, SequenceOutput
from loraplex.engine.tokenizer import Conversations, Tokenizer
from loraplex.errors import (
    AdapterError,
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    LoraplexError,
    NotReadyError,
)
from loraplex.model.loader import (
    base_layers,
    build_skeleton,
    num_embedded_tokens,
    read_config,
    resolve_device,
)
from loraplex.model.machine import budget_bytes, choose_threads, compute_alone
from loraplex.types import AdapterInfo, ClassifyRequest, ClassifyResult, Message, Stats, Timings, Usage

logger = logging.getLogger(__name__)


class ServingBackend:
    """One base, adapters that come and go, one executor. It is its store's loader."""

    def __init__(self, bundle: Bundle, config: EngineConfig, executor: Executor) -> None:
        self._bundle, self._config, self._executor = bundle, config, executor
        self._state = None if self._config.state_dir is None else AdapterState(Path(self._config.state_dir))
        self._registry: AdapterRegistry | None = None
        self._store: AdapterStore[LoadedClassifier] | None = None
        self._reader: ClassifierReader | None = None
        self._tokenizer: Tokenizer | None = None
        self._engine: Computation | None = None
        self._max_model_len = 0
        self._threads = TokenizerThreads()
        self._admission: Admission | None = None
        self._stop_ids: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        return self._executor.name

    @property
    def base_name(self) -> str:
        return self._bundle.base_name

    @property
    def alive(self) -> bool:
        return self._engine is not None and self._engine.alive

    async def start(self) -> None:
        try:
            if self._state is not None:
                self._state.acquire()
            preload = preloaded(self._config.preload, self._bundle, self._state)
            thread = ThreadPoolExecutor(1, "loraplex-load")
            try:
                await asyncio.get_running_loop().run_in_executor(thread, self._load)
            finally:
                thread.shutdown(wait=False)  # which ends it, and its OpenMP threads: see `compute_alone`
            await self._ready_registry().start(preload)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
        self._threads.close()
        if self._store is not None:
            await self._store.close()
        if self._registry is not None:
            self._registry.close()
        if self._state is not None:
            self._state.release()
        self._engine = self._store = self._registry = None
        self._executor.close()

    # ------------------------------------------------------------------------------------------- adapters

    def adapters(self) -> tuple[AdapterInfo, ...]:
        return () if self._registry is None else self._registry.adapters()

    def adapter(self, name: str) -> AdapterInfo:
        return self._ready_registry().adapter(name)

    @property
    def num_waiting(self) -> int:
        if self._engine is None:
            return 0
        num_accepted = 0 if self._admission is None else self._admission.num_evaluations
        return max(self._engine.num_waiting, num_accepted - self._engine.num_running)

    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self._ready_store().entries() if one.is_asked)

    def knows(self, name: str) -> bool:
        return self._store is not None and self._store.knows(name)

    def stats(self) -> Stats:
        store, engine = self._ready_store(), self._engine
        num_blocks, num_available = (0, 0) if engine is None else engine.num_blocks
        steps = Steps() if engine is None else engine.steps
        entries = store.entries()
        return Stats(
            num_waiting=self.num_waiting,
            num_running=0 if engine is None else engine.num_running,
            num_blocks=num_blocks,
            num_available_blocks=num_available,
            adapters={entry.name: entry.state for entry in entries},
            active=tuple(one.name for one in entries if one.loaded and store.slots.num_leases(one.loaded.kv_id)),
            placing=tuple(one.name for one in entries if one.loaded and store.is_awaited(one.loaded)),
            num_slots=len(store.slots),
            max_slots=store.slots.max_slots,
            device_bytes=store.slots.num_bytes,
            host_bytes=store.host.num_bytes,
            num_reads=store.num_loads,
            num_steps=steps.num_steps,
            num_step_tokens=steps.num_tokens,
            num_step_sequences=steps.num_sequences,
            step_seconds=steps.seconds,
        )

    async def load_adapter(
        self, name: str, source: str, *, pin: bool | None = None, replace: bool = True
    ) -> AdapterInfo:
        return await self._ready_registry().load(name, source, pin, replace)

    async def unload_adapter(self, name: str) -> None:
        await self._ready_registry().unload(name)
        if self._engine is not None:
            await asyncio.to_thread(self._executor.give_back)

    async def pin_adapter(self, name: str, is_pinned: bool) -> AdapterInfo:
        return await self._ready_registry().pin(name, is_pinned)

    def decode(self, *token_ids: int) -> str:
        return self._ready_tokenizer().decode(*token_ids)

    async def loaded(self, name: str) -> LoadedClassifier:
        """The version that answers now, read if need be."""
        lease = await self._ready_store().lease(name)
        lease.release()
        return lease.version

    # ------------------------------------------------------------------------------------------- the store's loader

    def read(self, source: AdapterSource) -> tuple[LoadedClassifier, AdapterWeights]:
        assert self._reader is not None
        return self._reader.read(source)

    def place(self, slot: int, version: LoadedClassifier, weights: AdapterWeights) -> None:
        if not self._executor.capabilities.reads_folders:
            self._executor.set_slot(slot, version.source.path, weights)
            return
        # What it reads must be what was checked, also where somebody writes into the folder meanwhile.
        with tempfile.TemporaryDirectory(prefix="loraplex-") as copy:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                try:
                    shutil.copy(version.source.path / name, copy)
                except OSError as exc:
                    raise AdapterError(
                        version.source.path / name, f"not readable: {exc}", remedy="put the file back"
                    ) from None
            found, _ = self.read(replace(version.source, path=Path(copy)))
            if found.kv_id != version.kv_id:
                raise AdapterError(
                    version.source.path,
                    f"changed on disk since version {version.version} was loaded from it",
                    remedy="load it again, or put the old files back",
                )
            self._executor.set_slot(slot, Path(copy), weights)

    def clear(self, slot: int) -> None:
        if self._engine is not None:
            self._executor.clear_slot(slot)

    async def prove(self, version: LoadedClassifier, slot: int) -> None:
        async def compute(sequences: Seq[Sequence]) -> Seq[Outcome]:
            return await self._compute(sequences, None)

        await prove(version, slot, self._ready_tokenizer(), self._max_model_len, compute)

    # ------------------------------------------------------------------------------------------- requests

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        started = time.monotonic()
        self._ready_store()
        names = self._names(request)
        with self._ready_admission().evaluations(len(names)):
            return await self._classify(request, names, started)

    async def _classify(self, request: ClassifyRequest, names: Seq[str], started: float) -> ClassifyResult:
        deadline_s = _deadline(started, request.deadline_ms)
        store = self._ready_store()
        questions: dict[str, Question] = {}
        at_hand: list[tuple[Question, Lease[LoadedClassifier]]] = []
        late = []
        for name in names:
            question = questions[name] = Question(name=name)
            try:
                lease = store.try_lease(name)
            except LoraplexError as exc:
                question.error = exc
                continue
            if lease is None:
                late.append(question)
            else:
                at_hand.append((question, lease))
        # Those that are on the device do not wait for those that are not. They are answered in this task: one that was
        # cancelled before it ran would never give their leases back.
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._answer_late(request, question, deadline_s)) for question in late]
            tokenized = await self._answer_leased(request, at_hand, deadline_s) if at_hand else started
        tokenized = max([tokenized, *(task.result() for task in tasks)])
        errors = [question.error for question in questions.values() if question.error is not None]
        if len(errors) == len(questions):
            raise errors[0]
        outputs = [output for question in questions.values() for output in question.outputs]
        id, tokenizer = f"cls-{uuid.uuid4().hex}", self._ready_tokenizer()
        return ClassifyResult(
            id=id,
            verdicts=tuple(
                question.verdict(tokenizer, f"{id}-{index}") for index, question in enumerate(questions.values())
            ),
            usage=_usage(
                sum(question.num_prompt_tokens for question in questions.values()),
                sum(sequence.num_computed_tokens for one in questions.values() for sequence in one.sequences),
            ),
            timings=_timings(started, tokenized, outputs),
        )

    async def _answer_late(self, request: ClassifyRequest, question: Question, deadline_s: float | None) -> float:
        """Load and place it first, as far as the deadline allows."""
        try:
            lease = await self._lease(question.name, deadline_s)
        except LoraplexError as exc:
            question.error = exc
        else:
            return await self._answer_leased(request, [(question, lease)], deadline_s)
        return time.monotonic()

    async def _lease(self, name: str, deadline_s: float | None) -> Lease[LoadedClassifier]:
        try:
            async with asyncio.timeout(None if deadline_s is None else max(0.0, deadline_s - time.monotonic())):
                return await self._ready_store().lease(name)
        except TimeoutError:
            raise DeadlineExceededError(
                f"{name!r} was not on the device before the deadline", remedy="allow more time, or preload and pin it"
            ) from None

    async def _answer_leased(
        self,
        request: ClassifyRequest,
        leased: Seq[tuple[Question, Lease[LoadedClassifier]]],
        deadline_s: float | None,
    ) -> float:
        """Answer them together. Returns when they were tokenized. The leases are given back once the engine needs the
        slots no more, whatever happens here."""

        def release() -> None:
            for _, lease in leased:
                lease.release()

        def ask() -> list[Sequence]:
            tokenizer = self._ready_tokenizer()
            conversations = Conversations(tokenizer)
            for question in questions:
                question.ask(request, tokenizer, conversations, self._max_model_len)
            return [sequence for question in questions for sequence in question.sequences]

        questions = [question for question, _ in leased]
        try:
            for question, lease in leased:
                question.loaded, question.slot = lease.version, lease.slot
            sequences, num_tokens = await self._tokenize(ask, num_chars(request.input), deadline_s)
        except LoraplexError as exc:  # late, or too much waits
            release()
            for question in questions:
                question.error = exc
            return time.monotonic()
        except BaseException:
            release()
            raise
        tokenized = time.monotonic()
        try:
            outcomes = iter(await self._compute(sequences, deadline_s, release, num_tokens))
        except LoraplexError as exc:  # the engine is gone
            for question in questions:
                question.error = question.error or exc
        else:
            for question in questions:
                question.answer([next(outcomes) for _ in question.sequences])
        return tokenized

    async def generate(self, request: GenerateRequest, on_token: OnToken | None = None) -> GenerateResult:
        started = time.monotonic()
        with self._ready_admission().evaluations(1):
            return await self._generate(request, on_token, started)

    async def _generate(self, request: GenerateRequest, on_token: OnToken | None, started: float) -> GenerateResult:
        deadline_s = _deadline(started, request.deadline_ms)
        loop = asyncio.get_running_loop()

        def tell(token: GeneratedToken, text: str) -> None:
            assert on_token is not None
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(on_token, token, text)

        completion = Completion(
            request, self._ready_tokenizer(), self._max_model_len, self._stop_ids, None if on_token is None else tell
        )
        lease = None
        if request.adapter is not None:
            lease = self._ready_store().try_lease(request.adapter) or await self._lease(request.adapter, deadline_s)
        loaded, slot = (None, NO_ADAPTER) if lease is None else (lease.version, lease.slot)
        release: Callable[[], None] = lease.release if lease is not None else lambda: None
        try:
            [sequence], num_tokens = await self._tokenize(
                lambda: [completion.make_sequence(loaded, slot)], num_chars(request.prompt), deadline_s
            )
        except BaseException:
            release()
            raise
        tokenized = time.monotonic()
        [outcome] = await self._compute([sequence], deadline_s, release, num_tokens)
        if isinstance(outcome, LoraplexError):
            raise outcome
        return completion.result(outcome, _timings(started, tokenized, [outcome]))

    async def show_prompt(self, request: ClassifyRequest) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        tokenizer, store = self._ready_tokenizer(), self._ready_store()
        conversations = Conversations(tokenizer)
        shown = []
        for name in self._names(request):
            lease = await store.lease(name)
            try:
                prompt = render(lease.version, request.input, tokenizer, conversations, self._max_model_len)
            finally:
                lease.release()
            shown.append((name, prompt.text, prompt.token_ids))
        return tuple(shown)

    def _names(self, request: ClassifyRequest) -> tuple[str, ...]:
        every = self.names() if request.classifiers == "*" else map(valid_unicode, request.classifiers)
        names = tuple(dict.fromkeys(every))
        if not names:
            raise InvalidRequestError(
                "no classifier is asked", remedy='name at least one, or "*" for all that are loaded'
            )
        return names

    def _ready_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise NotReadyError("the backend is not started", remedy="wait until /ready answers 200")
        return self._tokenizer

    def _ready_store(self) -> AdapterStore[LoadedClassifier]:
        if self._store is None:
            raise NotReadyError("the backend is not running", remedy="wait until /ready answers 200")
        return self._store

    def _ready_admission(self) -> Admission:
        if self._admission is None:
            raise NotReadyError("the backend is not running", remedy="wait until /ready answers 200")
        return self._admission

    def _ready_registry(self) -> "AdapterRegistry":
        if self._registry is None:
            raise NotReadyError("the backend is not running", remedy="wait until /ready answers 200")
        return self._registry

    async def _tokenize(
        self, make: Callable[[], list[Sequence]], num_chars: int, deadline_s: float | None
    ) -> tuple[list[Sequence], int]:
        """The sequences that `make` makes in a tokenizer's thread, and the tokens to compute for them."""

        def work() -> tuple[list[Sequence], int]:
            sequences = make()
            return sequences, self._engine.cost(sequences) if self._engine is not None else 0

        admission = self._ready_admission()
        if num_chars >= LONG_CHARS:
            admission.check_long_text(self._threads.num_long_chars, num_chars)
        sequences, num_tokens = await self._threads.run(work, num_chars, deadline_s)
        admission.check_tokens(num_tokens)
        return sequences, num_tokens

    async def _compute(
        self,
        sequences: Seq[Sequence],
        deadline_s: float | None,
        release: Callable[[], None] = lambda: None,
        num_tokens: int = 0,
    ) -> Seq[Outcome]:
        loop = asyncio.get_running_loop()

        def on_end() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and all leases with it
                loop.call_soon_threadsafe(release)

        try:
            if not sequences:
                release()
                return ()
            if self._engine is None:
                raise NotReadyError("the backend is not running", remedy="wait until /ready answers 200")
            request = EngineRequest(sequences, deadline_s=deadline_s, num_tokens=num_tokens, on_end=on_end)
            self._engine.submit(request)
        except BaseException:
            release()
            raise
        left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        future = asyncio.wrap_future(request.future)
        try:
            await asyncio.wait({future}, timeout=left_s)
            if future.done():
                return future.result()
            late = DeadlineExceededError(
                "not computed before the deadline", remedy="allow more time or send less at once"
            )
            return request.outcomes(late)  # before it is cancelled, which the engine may see at once
        finally:
            request.future.cancel()  # where its caller left or is late: the scheduler drops what has not run

    # ------------------------------------------------------------------------------------------- loading

    def _load(self) -> None:
        """Everything cheap is checked before the base's weights are read."""
        bundle, config, executor = self._bundle, self._config, self._executor
        device = resolve_device(config.device)
        choose_threads()
        packs = not executor.capabilities.other_bases
        model_config = read_config(bundle.base, packs=packs)
        skeleton = build_skeleton(model_config, bundle.base, packs=packs)
        tokenizer = Tokenizer(bundle.base, num_embedded_tokens(skeleton))
        max_model_len = executor.max_model_len(model_config)
        pad = getattr(model_config, "pad_token_id", None)
        reader = ClassifierReader(base_layers(skeleton), tokenizer, max_model_len, executor.capabilities, pad)
        if config.preload == "all":
            remembered = () if self._state is None else self._state.remembered()
            others = {one.name for one in remembered if one.source != BUNDLE}  # unloaded since, or replaced
            for source in bundle.adapters:
                if source.name not in others:
                    reader.read(source)
        engine = executor.load(bundle.base, model_config, bundle.adapters)
        reader.executor = executor
        if executor.max_slots is None:
            slots = SlotTable(budget_bytes=budget_bytes(config.adapter_memory, device), max_slots=config.max_adapters)
        else:
            slots = SlotTable(budget_bytes=sys.maxsize, max_slots=executor.max_slots)
        host = HostTier(budget_bytes(config.host_memory, resolve_device("cpu")))
        self._store = AdapterStore(self, slots, host, compute_alone)
        self._registry = AdapterRegistry(bundle, config, self._store, self._state)
        self._tokenizer, self._max_model_len, self._reader = tokenizer, max_model_len, reader
        self._stop_ids = executor.stop_ids
        self._engine = engine
        self._admission = Admission(engine, max_queue=config.max_queue, max_queue_tokens=config.max_queue_tokens)
        logger.info("%s with %s on %s, %d adapters", self.base_name, self.name, device, len(bundle.adapters))


def open_backend(bundle: Bundle, config: EngineConfig | None = None) -> ServingBackend:
    """The backend that `config` (by default the bundle's own) names; `start` loads it. ConfigurationError: what it
    needs is not installed."""
    config = config or resolve(EngineConfig, bundle.settings.engine, {})
    return ServingBackend(bundle, config, _executor(config))


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _executor(config: EngineConfig) -> Executor:
    """Each is imported only where it is asked for."""
    if config.backend == "peft":
        if not is_installed("peft"):
            raise ConfigurationError(
                "--backend peft", "PEFT is not installed", remedy="pip install 'loraplex[train]', or --backend native"
            )
        from loraplex.backends.peft import PeftExecutor

        return PeftExecutor(config)
    if config.backend == "vllm":
        if not is_installed("vllm"):
            raise ConfigurationError(
                "--backend vllm",
                "vLLM is not installed",
                remedy="pip install 'loraplex[vllm]', or --backend native; for a CPU see docs/backends.md",
            )
        try:
            from loraplex.backends.vllm import VllmExecutor
        except ImportError as exc:
            raise ConfigurationError(
                "--backend vllm",
                f"the vLLM that is installed does not import: {exc}",
                remedy="install 0.32 or newer; for a CPU see docs/backends.md",
            ) from None
        return VllmExecutor(config)
    from loraplex.backends.native import NativeExecutor

    return NativeExecutor(config)


def num_chars(text: str | Seq[int] | Seq[Message] | Seq[int | Message]) -> int:
    """About how much there is to tokenize."""
    return len(text) + sum(len(one.content) for one in text if isinstance(one, Message))


def _deadline(started: float, deadline_ms: float | None) -> float | None:
    return None if deadline_ms is None else started + deadline_ms / 1000


def _usage(num_prompt_tokens: int, num_computed_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=num_prompt_tokens,
        computed_tokens=num_computed_tokens,
        cached_tokens=max(0, num_prompt_tokens - num_computed_tokens),
    )


def _timings(started: float, tokenized: float, outputs: Seq[SequenceOutput]) -> Timings:
    return Timings(
        tokenize_ms=(tokenized - started) * 1000,
        queue_ms=max((output.queued_s for output in outputs), default=0.0) * 1000,
        compute_ms=max((output.computed_s for output in outputs), default=0.0) * 1000,
        total_ms=(time.monotonic() - started) * 1000,
    )
