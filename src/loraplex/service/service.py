"""Answers requests over one base: leases versions, tokenizes, computes, and makes verdicts and texts."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

from loraplex.adapters.residence import Lease
from loraplex.adapters.slots import NO_ADAPTER
from loraplex.classifier import Contract, valid_unicode
from loraplex.discovery import SkippedFolder
from loraplex.engine.sequence import Sequence, SequenceOutput
from loraplex.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    LoraplexError,
    UnknownClassifierError,
    quoted,
)
from loraplex.executors.executor import Executor
from loraplex.generation import GeneratedToken, GenerateRequest, GenerateResult, OnToken
from loraplex.service.base import Base
from loraplex.service.classifiers import ClassifierVersion
from loraplex.service.completion import Completion
from loraplex.service.computing import Computing, num_chars
from loraplex.service.prompts import Prompts
from loraplex.service.question_limits import FRAME_CHARS, NUM_SEQUENCES, check_questions, no_questions
from loraplex.service.questions import QuestionEvaluation
from loraplex.service.registry import AdapterRegistry
from loraplex.service.state import AdapterState
from loraplex.service.usage import AnyEvaluation, timings_of, usage_of
from loraplex.service.verdict import Evaluation
from loraplex.service.versions import Versions
from loraplex.text.threads import not_tokenized
from loraplex.text.tokenizer import Conversations
from loraplex.types import AdapterInfo, ClassifyRequest, ClassifyResult, Question, Stats

Leased = tuple[Evaluation, Lease[ClassifierVersion]]
MAX_UNKNOWN = 100  # unknown names in a call that is still answered; each has an error of its own in the answer


class Service:
    """Serves one base and adapters that come and go, with one executor. `service.start` makes it.

    All methods are called from one event loop; none of them blocks it. After `close` they raise NotReadyError. The
    parts are public attributes for inspection.
    """

    def __init__(
        self,
        *,
        base: Base,
        executor: Executor,
        computing: Computing,
        versions: Versions[ClassifierVersion],
        registry: AdapterRegistry,
        state: AdapterState | None,
    ) -> None:
        self.base, self.executor, self.computing = base, executor, computing
        self.prompts = Prompts(base, versions, computing)
        self.versions, self.registry, self._state = versions, registry, state

    @property
    def base_name(self) -> str:
        """The name by which the base is shown, the first of `base_names`."""
        return self.base.names[0]

    @property
    def base_names(self) -> tuple[str, ...]:
        """The names by which the base is asked."""
        return self.base.names

    @property
    def answers_questions(self) -> bool:
        """Whether the bare base answers questions that no adapter was trained for."""
        return self.base.questions is not None

    @property
    def alive(self) -> bool:
        """Whether the service can still compute."""
        return self.computing.computation.alive

    async def close(self) -> None:
        """Finish all accepted requests, then free everything. Safe to call twice."""
        await self.computing.close()
        await self.versions.close()
        self.registry.close()
        if self._state is not None:
            self._state.release()
        self.executor.close()

    # ------------------------------------------------------------------------------------------- adapters

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """Return all known adapters, in the order in which they came."""
        return self.registry.adapters()

    def skipped(self) -> tuple[SkippedFolder, ...]:
        """Return the bundle's folders that hold an adapter and were left out at the start, with the reasons."""
        return self.registry.skipped()

    def adapter(self, name: str) -> AdapterInfo:
        """Return the adapter of that name. Raises UnknownClassifierError where there is none."""
        return self.registry.adapter(name)

    def contract(self, name: str) -> Contract | None:
        """Return the contract of that adapter, or None where it has none. Raises UnknownClassifierError where there is
        no such adapter."""
        return self.versions.entry(name).source.contract

    def names(self) -> tuple[str, ...]:
        """Return the classifiers that `"*"` asks."""
        return self.versions.names.asked()

    def knows(self, name: str) -> bool:
        """Return whether there is an adapter of that name that can be asked."""
        return self.versions.names.knows(name)

    def failed(self) -> dict[str, str]:
        """Return the adapters that cannot be used: name -> code of the error. Cheap: called at every probe."""
        entries = self.versions.names.entries()
        return {one.name: one.error.code for one in entries if one.state == "failed" and one.error is not None}

    async def load_adapter(
        self, name: str, source: str, *, pin: bool | None = None, replace: bool = True
    ) -> AdapterInfo:
        """Load the adapter in `source` (a path below an adapter root, hf://…, s3://…) as `name`.

        The adapter replaces the one that has the name: requests in flight finish on the old version, later ones get the
        new version. Returns when the new version answers. Raises AdapterError or ContractError where the adapter is
        broken; the old version then goes on. Raises AdapterExistsError where the name is taken and `replace` is False.
        """
        return await self.registry.load(name, source, pin, replace)

    def unload_adapter(self, name: str) -> "asyncio.Task[None]":
        """Unload the adapter: new requests do not find it from this call on. The task ends when its last request is
        answered and its memory is free. Raises UnknownClassifierError where there is no adapter of that name."""
        unloading = self.registry.unload(name)

        async def unload() -> None:
            await unloading
            await asyncio.to_thread(self.executor.give_back)

        return asyncio.create_task(unload())

    async def pin_adapter(self, name: str, is_pinned: bool) -> AdapterInfo:
        """Pin or unpin the adapter. A pinned adapter keeps its slot; it is loaded first if needed. Raises
        UnknownClassifierError where there is no adapter of that name."""
        return await self.registry.pin(name, is_pinned)

    @property
    def num_waiting(self) -> int:
        """Evaluations that were accepted and do not run yet. Cheap."""
        return self.computing.num_waiting

    def stats(self) -> Stats:
        """Return the current figures. Cheap: called at every scrape and every answer."""
        computation, residence, entries = (
            self.computing.computation,
            self.versions.residence,
            self.versions.names.entries(),
        )
        num_blocks, num_available = computation.num_blocks
        steps, slots = computation.steps, residence.slots
        return Stats(
            num_waiting=self.num_waiting,
            num_running=computation.num_running,
            num_blocks=num_blocks,
            num_available_blocks=num_available,
            adapters={entry.name: entry.state for entry in entries},
            active=tuple(one.name for one in entries if one.live and slots.num_leases(one.live.kv_id)),
            placing=tuple(one.name for one in entries if one.live and residence.is_awaited(one.live)),
            num_slots=len(slots),
            max_slots=slots.max_slots,
            device_bytes=slots.num_bytes,
            host_bytes=residence.host.num_bytes,
            num_reads=residence.num_reads,
            num_steps=steps.num_steps,
            num_step_tokens=steps.num_tokens,
            num_step_sequences=steps.num_sequences,
            step_seconds=steps.seconds,
        )

    # ------------------------------------------------------------------------------------------- requests

    async def classify(self, request: ClassifyRequest, *, may_fail: bool = False) -> ClassifyResult:
        """Return one verdict per classifier, in order, then one per question. One that fails has its error in its
        verdict. Where all fail, the first error is raised, unless `may_fail`. Raises QueueFullError where too much
        waits, and UnknownClassifierError where the request names more than MAX_UNKNOWN unknown classifiers, or has
        questions and the base answers none. Raises InvalidRequestError for a question that nobody can answer."""
        started = time.monotonic()
        names = self._names(request)
        self.check_questions(request.questions, names)
        unknown = [name for name in names if not self.knows(name)]
        if len(unknown) > MAX_UNKNOWN:
            raise UnknownClassifierError(unknown, list(self.names()))
        with self.computing.admission.evaluations(len(names) + NUM_SEQUENCES * len(request.questions)):
            return await self._classify(request, names, started, may_fail)

    async def _classify(
        self, request: ClassifyRequest, names: Seq[str], started: float, may_fail: bool
    ) -> ClassifyResult:
        deadline_s = _deadline(started, request.deadline_ms)
        asked = [Evaluation(name=name) for name in names]
        questions = [QuestionEvaluation(name=name, question=one) for name, one in request.questions.items()]
        evaluations: list[AnyEvaluation] = [*asked, *questions]
        placed: list[Leased] = []
        absent = []
        for evaluation in asked:
            try:
                lease = self.versions.try_lease(evaluation.name)
            except LoraplexError as exc:
                evaluation.error = exc
                continue
            if lease is None:
                absent.append(evaluation)
            else:
                placed.append((evaluation, lease))
        # Versions on the device, and questions, do not wait for the others. They are answered in this task, because a
        # task that is cancelled before it runs would never release their leases.
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._place_and_answer(request, one, deadline_s)) for one in absent]
            tokenized = await self._answer(request, placed, questions, deadline_s) if placed or questions else started
        tokenized = max([tokenized, *(task.result() for task in tasks)])
        errors = [evaluation.error for evaluation in evaluations if evaluation.error is not None]
        if len(errors) == len(evaluations) and not may_fail:
            raise errors[0]
        id = f"cls-{uuid.uuid4().hex}"
        return ClassifyResult(
            id=id,
            verdicts=tuple(one.verdict(f"{id}-{index}") for index, one in enumerate(evaluations)),
            usage=usage_of(evaluations),
            timings=timings_of(started, tokenized, [output for one in evaluations for output in one.outputs]),
        )

    async def _place_and_answer(
        self, request: ClassifyRequest, evaluation: Evaluation, deadline_s: float | None
    ) -> float:
        """Load and place the version, within the deadline, then answer. Return when the input was tokenized."""
        try:
            lease = await self._lease(evaluation.name, deadline_s)
        except LoraplexError as exc:
            evaluation.error = exc
            return time.monotonic()
        return await self._answer(request, [(evaluation, lease)], (), deadline_s)

    async def _answer(
        self,
        request: ClassifyRequest,
        leased: Seq[Leased],
        questions: Seq[QuestionEvaluation],
        deadline_s: float | None,
    ) -> float:
        """Compute evaluations together. Return the time at which they were tokenized. The leases are released when the
        engine no longer needs the slots, even if this call fails."""

        def release() -> None:
            for _, lease in leased:
                lease.release()

        has_left = False

        def tokenize() -> list[Sequence]:
            conversations = Conversations()
            for evaluation in evaluations:
                if has_left or (deadline_s is not None and time.monotonic() >= deadline_s):
                    raise not_tokenized()
                evaluation.tokenize(request, self.base, conversations)
            return [sequence for evaluation in evaluations for sequence in evaluation.sequences]

        evaluations: list[AnyEvaluation] = [*(evaluation for evaluation, _ in leased), *questions]
        for one, lease in leased:
            one.version, one.slot = lease.version, lease.slot
        try:
            num = num_chars(request.input) + sum(FRAME_CHARS + NUM_SEQUENCES * one.num_chars for one in questions)
            work = await self.computing.tokenize(tokenize, num, deadline_s, release)
            tokenized = time.monotonic()
            outcomes = iter(await self.computing.compute(work))
        except LoraplexError as exc:  # the deadline passed, the queue is full, or the engine is gone
            for evaluation in evaluations:
                evaluation.error = evaluation.error or exc
            return time.monotonic()
        finally:
            has_left = True  # a thread that still tokenizes does so for nobody
        for evaluation in evaluations:
            evaluation.take([next(outcomes) for _ in evaluation.sequences])
        return tokenized

    async def generate(
        self,
        request: GenerateRequest,
        on_token: OnToken | None = None,
        on_prompt: Callable[[int], None] | None = None,
    ) -> GenerateResult:
        """Generate text. `on_prompt` is called with the number of the prompt's tokens before it is computed. `on_token`
        is called on the event loop with each token as it comes, and with all of them before this method returns.

        Raises InvalidRequestError, which names a parameter out of range or says why the messages make no prompt. Raises
        UnknownClassifierError for an unknown adapter; the base never answers in its place.
        """
        started = time.monotonic()
        with self.computing.admission.evaluations(1):
            return await self._generate(request, on_token, on_prompt, started)

    async def _generate(
        self,
        request: GenerateRequest,
        on_token: OnToken | None,
        on_prompt: Callable[[int], None] | None,
        started: float,
    ) -> GenerateResult:
        deadline_s = _deadline(started, request.deadline_ms)
        loop = asyncio.get_running_loop()

        def tell(token: GeneratedToken, text: str) -> None:
            assert on_token is not None
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(on_token, token, text)

        completion = Completion(request, self.base, None if on_token is None else tell)
        lease = None
        if request.adapter is not None:
            lease = self.versions.try_lease(request.adapter) or await self._lease(request.adapter, deadline_s)
        version, slot = (None, NO_ADAPTER) if lease is None else (lease.version, lease.slot)
        release: Callable[[], None] = lease.release if lease is not None else lambda: None
        work = await self.computing.tokenize(
            lambda: completion.make_sequences(version, slot), num_chars(request.prompt), deadline_s, release
        )
        tokenized = time.monotonic()
        if on_prompt is not None:
            on_prompt(completion.num_prompt_tokens)
        outcomes = await self.computing.compute(work)
        for outcome in outcomes:
            if isinstance(outcome, LoraplexError):
                raise outcome
        outputs = [outcome for outcome in outcomes if isinstance(outcome, SequenceOutput)]
        return completion.result(outputs, timings_of(started, tokenized, outputs))

    async def show_prompt(self, request: ClassifyRequest) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Return (name, prompt, token ids) for each classifier of the request, and for each question in each order of
        its labels, without computing an answer."""
        names = self._names(request)
        self.check_questions(request.questions, names)
        return await self.prompts.show(names, request)

    async def version_of(self, name: str) -> ClassifierVersion:
        """Return the version that answers for `name`, loading it if needed."""
        lease = await self.versions.lease(name)
        lease.release()
        return lease.version

    async def _lease(self, name: str, deadline_s: float | None) -> Lease[ClassifierVersion]:
        try:
            async with asyncio.timeout(None if deadline_s is None else max(0.0, deadline_s - time.monotonic())):
                return await self.versions.lease(name)
        except TimeoutError:
            raise DeadlineExceededError(
                f"{name!r} was not on the device before the deadline", remedy="allow more time, or preload and pin it"
            ) from None

    def check_questions(self, questions: Mapping[str, Question], names: Seq[str] = ()) -> None:
        """Raise UnknownClassifierError or InvalidRequestError where a question to the bare base cannot be asked beside
        `names`. Cheap: nothing is tokenized."""
        if questions and not self.answers_questions:
            raise no_questions(questions, self.names())
        if taken := next((name for name in questions if name in names), None):
            remedy = "give the question another name"
            raise InvalidRequestError(f"{quoted(taken)} is asked as a classifier and as a question", remedy=remedy)
        check_questions(questions)

    def _names(self, request: ClassifyRequest) -> tuple[str, ...]:
        every = self.names() if request.classifiers == "*" else map(valid_unicode, request.classifiers)
        names = tuple(dict.fromkeys(every))
        if not names and not request.questions:
            raise InvalidRequestError(
                "no classifier is asked", remedy='name at least one, or "*" for all that are loaded'
            )
        return names


def _deadline(started: float, deadline_ms: float | None) -> float | None:
    return None if deadline_ms is None else started + deadline_ms / 1000
