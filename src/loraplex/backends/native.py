"""Loraplex's own engine behind the Backend protocol."""

import asyncio
import hashlib
import logging
import math
import time
import uuid
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from loraplex.adapters.checkpoint import read_adapter
from loraplex.adapters.weights import AdapterWeights
from loraplex.backends.base import GeneratedToken, GenerateRequest, GenerateResult
from loraplex.bundle import CONTRACT, AdapterSource, Bundle
from loraplex.classifier import DEFAULT_ROLES, conversation_text, valid_unicode
from loraplex.config import EngineConfig, resolve
from loraplex.engine.block_pool import BASE_KV, BlockPool
from loraplex.engine.engine import Engine
from loraplex.engine.runner import ModelRunner
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import (
    NEXT_TOKEN,
    NO_ADAPTER,
    EngineRequest,
    Outcome,
    Sampling,
    Sequence,
    SequenceOutput,
    Target,
)
from loraplex.engine.tokenizer import Conversations, Prompt, Template, Tokenizer, verbatim
from loraplex.errors import (
    ContractError,
    InvalidRequestError,
    LoraplexError,
    NotReadyError,
    UnknownClassifierError,
)
from loraplex.model.kv_cache import budget_bytes
from loraplex.model.loader import (
    build_skeleton,
    default_step_tokens,
    linear_shapes,
    load_base,
    num_embedded_tokens,
    read_config,
    resolve_device,
    resolve_dtype,
    stop_token_ids,
)
from loraplex.types import (
    AdapterInfo,
    AdapterRef,
    ClassifyRequest,
    ClassifyResult,
    ErrorInfo,
    Timings,
    Usage,
    Verdict,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedClassifier:
    source: AdapterSource
    version: str
    slot: int
    template: Template | None
    adapter: AdapterWeights

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(name=self.source.name, version=self.version)


class NativeBackend:
    """One base, its adapters in slots, one engine thread."""

    name = "native"

    def __init__(self, bundle: Bundle, config: EngineConfig | None = None) -> None:
        self._bundle = bundle
        self._config = config or resolve(EngineConfig, bundle.settings.engine, {})
        self._classifiers: dict[str, LoadedClassifier] = {}
        self._tokenizer: Tokenizer | None = None
        self._engine: Engine | None = None
        self._max_model_len = 0
        self._stop_ids: frozenset[int] = frozenset()

    @property
    def base_name(self) -> str:
        return self._bundle.base.resolve().name

    @property
    def alive(self) -> bool:
        return self._engine is not None and self._engine.alive

    async def start(self) -> None:
        await asyncio.to_thread(self._load)
        try:
            await self._check_golden()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
        self._engine, self._classifiers = None, {}

    def adapters(self) -> tuple[AdapterInfo, ...]:
        return tuple(
            AdapterInfo(
                name=name,
                version=loaded.version,
                rank=loaded.adapter.rank,
                num_parameters=loaded.adapter.num_parameters,
                labels=loaded.source.contract.labels if loaded.source.contract else None,
                question=loaded.source.contract.question if loaded.source.contract else None,
                path=str(loaded.source.path),
            )
            for name, loaded in self._classifiers.items()
        )

    # ------------------------------------------------------------------------------------------ requests

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        started = time.monotonic()
        names = self._names(request)
        questions = await asyncio.to_thread(self._ask, request, names)
        tokenized = time.monotonic()
        sequences = [sequence for question in questions.values() for sequence in question.sequences]
        outcomes = iter(await self._compute(sequences, _deadline(started, request.deadline_ms)))
        verdicts = tuple(
            question.verdict([next(outcomes) for _ in question.sequences]) for question in questions.values()
        )
        if all(question.error is not None for question in questions.values()):
            raise next(question.error for question in questions.values() if question.error is not None)
        return ClassifyResult(
            id=f"cls-{uuid.uuid4().hex}",
            verdicts=verdicts,
            usage=_usage(
                sum(question.num_prompt_tokens for question in questions.values()),
                sum(output.num_computed_tokens for question in questions.values() for output in question.outputs),
            ),
            timings=_timings(started, tokenized, [o for question in questions.values() for o in question.outputs]),
        )

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        started = time.monotonic()
        _check_sampling(request)
        loaded = None if request.adapter is None else self._loaded(request.adapter)
        invocation = None if loaded is None else loaded.adapter.invocation_tokens
        prompt = await asyncio.to_thread(
            verbatim, request.prompt, self._ready_tokenizer(), self._max_model_len, invocation
        )
        tokenized = time.monotonic()
        sampling = Sampling(
            # The last token is not computed, so it needs no position.
            max_tokens=min(request.max_tokens, self._max_model_len - len(prompt.token_ids) + 1),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop_ids=self._stop_ids,
        )
        sequence = _sequence(prompt, loaded, keep=False, sampling=sampling)
        [outcome] = await self._compute([sequence], _deadline(started, request.deadline_ms))
        if isinstance(outcome, LoraplexError):
            raise outcome
        tokenizer, ids = self._ready_tokenizer(), [token.id for token in outcome.tokens]
        stopped = ids[-1] in self._stop_ids
        return GenerateResult(
            id=f"gen-{uuid.uuid4().hex}",
            text=tokenizer.decode(*(ids[:-1] if stopped else ids)),
            tokens=tuple(
                GeneratedToken(id=token.id, text=tokenizer.decode(token.id), log_prob=token.log_prob)
                for token in outcome.tokens
            ),
            finish_reason="stop" if stopped else "length",
            adapter=None if loaded is None else loaded.ref,
            # Of what it generated all but the last token were computed, and are no part of the prompt.
            usage=_usage(len(prompt.token_ids), max(0, outcome.num_computed_tokens - len(ids) + 1)),
            timings=_timings(started, tokenized, [outcome]),
        )

    def show_prompt(self, request: ClassifyRequest) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        questions = self._ask(request, self._names(request))
        shown = []
        for name, question in questions.items():
            if question.error is not None:
                raise question.error
            assert question.prompt is not None, "a question has a prompt or an error"
            shown.append((name, question.prompt.text, question.prompt.token_ids))
        return tuple(shown)

    def _names(self, request: ClassifyRequest) -> tuple[str, ...]:
        asked = self._classifiers if request.classifiers == "*" else map(valid_unicode, request.classifiers)
        names = tuple(dict.fromkeys(asked))
        if not names:
            raise InvalidRequestError(
                "no classifier is asked", remedy='name at least one, or "*" for all that are loaded'
            )
        return names

    def _loaded(self, name: str) -> LoadedClassifier:
        try:
            return self._classifiers[name]
        except KeyError:
            raise UnknownClassifierError(name, list(self._classifiers)) from None

    def _ready_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise NotReadyError("the backend is not started", remedy="wait until /ready answers 200")
        return self._tokenizer

    def _ask(self, request: ClassifyRequest, names: Seq[str]) -> dict[str, "_Question"]:
        """One question a classifier; its own error is kept in it."""
        tokenizer = self._ready_tokenizer()
        conversations = Conversations(tokenizer)
        questions = {}
        for name in names:
            question = _Question(name=name, tokenizer=tokenizer)
            try:
                question.ask(self._loaded(name), request, conversations, self._max_model_len)
            except LoraplexError as exc:
                question.error = exc
            questions[name] = question
        return questions

    async def _compute(self, sequences: Seq[Sequence], deadline_s: float | None) -> Seq[Outcome]:
        if not sequences:
            return ()
        if self._engine is None:
            raise NotReadyError("the backend is not running", remedy="wait until /ready answers 200")
        request = EngineRequest(sequences, deadline_s=deadline_s)
        self._engine.submit(request)
        # A caller that leaves cancels this await, and with it the future, which the scheduler sees.
        return await asyncio.wrap_future(request.future)

    # ------------------------------------------------------------------------------------------- loading

    def _load(self) -> None:
        """Everything cheap is checked before the base's weights are read."""
        bundle, config = self._bundle, self._config
        device = resolve_device(config.device)
        model_config = read_config(bundle.base)
        skeleton = build_skeleton(model_config, bundle.base)
        shapes = linear_shapes(skeleton)
        tokenizer = Tokenizer(bundle.base, num_embedded_tokens(skeleton))
        max_model_len = int(model_config.max_position_embeddings)
        classifiers, weights = {}, []
        for slot, source in enumerate(bundle.adapters):
            adapter = read_adapter(source.path, shapes)
            template = None
            if source.contract is not None:
                template = Template(
                    tokenizer, source.contract, max_model_len, source.path / CONTRACT, adapter.invocation_tokens
                )
            classifiers[source.name] = LoadedClassifier(
                source=source,
                version=_version(adapter.kv_id, source),
                slot=slot,
                template=template,
                adapter=adapter,
            )
            weights.append(adapter)
        runner = ModelRunner(load_base(model_config, bundle.base, resolve_dtype(config.dtype, device), device))
        runner.verify_packing()
        for slot, adapter in enumerate(weights):
            runner.set_slot(slot, adapter)
        num_blocks = budget_bytes(config.kv_cache, device) // runner.block_bytes
        runner.allocate_cache(num_blocks)
        scheduler = Scheduler(
            pool=BlockPool(num_blocks),
            max_step_tokens=config.max_step_tokens or default_step_tokens(device, runner.model.dtype),
            max_step_sequences=config.max_step_sequences,
            max_queue=config.max_queue,
        )
        self._tokenizer, self._max_model_len, self._classifiers = tokenizer, max_model_len, classifiers
        self._stop_ids = stop_token_ids(runner.model)
        self._engine = Engine(runner, scheduler)
        self._engine.start()
        logger.info("%s in %s on %s, %d adapters", self.base_name, runner.model.dtype, device, len(classifiers))

    async def _check_golden(self) -> None:
        for name, loaded in self._classifiers.items():
            for golden in loaded.source.contract.golden if loaded.source.contract else ():
                key = f"{loaded.source.path / CONTRACT}, key 'golden'"
                try:
                    result = await self.classify(ClassifyRequest(input=golden.text, classifiers=(name,)))
                except LoraplexError as exc:
                    raise ContractError(key, f"{golden.text!r}: {exc.message}", remedy=exc.remedy) from None
                if result.verdicts[0].label != golden.label:
                    raise ContractError(
                        key,
                        f"{golden.text!r} is answered {result.verdicts[0].label!r}, not {golden.label!r}",
                        remedy="correct the example, or the adapter is not the one that the contract is for",
                    )


@dataclass(slots=True, kw_only=True)
class _Question:
    """One classifier's part of a call: its sequences on the way in, its verdict on the way out."""

    name: str
    tokenizer: Tokenizer
    loaded: LoadedClassifier | None = None
    prompt: Prompt | None = None
    sequences: Seq[Sequence] = ()
    outputs: Seq[SequenceOutput] = ()
    error: LoraplexError | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.token_ids) if self.prompt is not None else 0

    def ask(
        self,
        loaded: LoadedClassifier,
        request: ClassifyRequest,
        conversations: Conversations,
        max_model_len: int,
    ) -> None:
        self.loaded = loaded
        contract = loaded.source.contract
        keep = request.conversation_id is not None
        if loaded.template is None or contract is None:
            text = conversation_text(request.input, DEFAULT_ROLES)
            self.prompt = verbatim(text, self.tokenizer, max_model_len, loaded.adapter.invocation_tokens)
            self.sequences = [_sequence(self.prompt, loaded, keep=keep)]
        else:
            self.prompt = loaded.template.prompt(conversation_text(request.input, contract.roles), conversations)
            self.sequences = _label_sequences(self.prompt, loaded, loaded.template, keep=keep)

    def verdict(self, outcomes: Seq[Outcome]) -> Verdict:
        self.error = self.error or next((outcome for outcome in outcomes if isinstance(outcome, LoraplexError)), None)
        ref = self.loaded.ref if self.loaded is not None else None
        if self.error is not None:
            return Verdict(classifier=self.name, adapter=ref, error=ErrorInfo.of(self.error))
        assert self.loaded is not None and self.prompt is not None, "a question without an error was asked"
        self.outputs = [outcome for outcome in outcomes if isinstance(outcome, SequenceOutput)]
        warnings = self.prompt.warnings or None
        contract, template = self.loaded.source.contract, self.loaded.template
        if contract is None or template is None:
            [output] = self.outputs
            return Verdict(
                classifier=self.name,
                label=self.tokenizer.decode(output.tokens[0].id),
                confidence=math.exp(output.tokens[0].log_prob),
                adapter=ref,
                warnings=warnings,
            )
        decision = contract.decide(_label_log_probs(self.outputs, template))
        return Verdict(
            classifier=self.name,
            label=decision.label,
            confidence=decision.confidence,
            scores=decision.scores,
            label_mass=decision.label_mass,
            abstained=decision.abstained,
            adapter=ref,
            warnings=warnings,
        )


def _sequence(
    prompt: Prompt,
    loaded: LoadedClassifier | None,
    *,
    keep: bool,
    targets: tuple[Target, ...] = (),
    continuation: tuple[int, ...] = (),
    sampling: Sampling = NEXT_TOKEN,
) -> Sequence:
    """Under an adapter, or with None the bare base. What the base computed of a conversation is always worth keeping;
    what an adapter computed only where `keep` says that the conversation goes on."""
    adapter = None if loaded is None else loaded.adapter
    shared = adapter is None or adapter.invocation_tokens is not None
    sequence = Sequence(
        token_ids=prompt.token_ids + continuation,
        slot=NO_ADAPTER if loaded is None else loaded.slot,
        kv_id=BASE_KV if adapter is None else bytes.fromhex(adapter.kv_id),
        activation=prompt.activation,
        num_kept=prompt.activation if shared else prompt.num_conversation if keep else 0,
        targets=targets,
        sampling=sampling,
    )
    if sequence.num_kept:
        _ = sequence.hashes  # here and not on the event loop's thread
    return sequence


def _label_sequences(prompt: Prompt, loaded: LoadedClassifier, template: Template, *, keep: bool) -> list[Sequence]:
    """One sequence reads all labels of one token; each longer label is a sequence of its own: the prompt and all of its
    tokens but the last, each of which is a target where it is predicted."""
    labels = template.label_ids.values()
    single = tuple(Target(position=-1, token_id=ids[0]) for ids in labels if len(ids) == 1)
    sequences = [_sequence(prompt, loaded, keep=keep, targets=single)] if single else []
    for ids in labels:
        if len(ids) > 1:
            targets = tuple(Target(position=i - len(ids), token_id=token_id) for i, token_id in enumerate(ids))
            sequences.append(_sequence(prompt, loaded, keep=keep, targets=targets, continuation=ids[:-1]))
    return sequences


def _label_log_probs(outputs: Seq[SequenceOutput], template: Template) -> list[float]:
    """The inverse of `_label_sequences`: log probability of each label, in the contract's order."""
    labels = template.label_ids.values()
    longer = iter(outputs[1:] if any(len(ids) == 1 for ids in labels) else outputs)
    single = iter(outputs[0].log_probs)
    return [next(single) if len(ids) == 1 else math.fsum(next(longer).log_probs) for ids in labels]


def _check_sampling(request: GenerateRequest) -> None:
    for name, value, wanted, is_good in (
        ("max_tokens", request.max_tokens, "at least 1", request.max_tokens >= 1),
        ("temperature", request.temperature, "0 or above", 0 <= request.temperature < math.inf),
        ("top_p", request.top_p, "above 0, at most 1", 0 < request.top_p <= 1),
    ):
        if not is_good:
            raise InvalidRequestError(f"{name} is {value}", remedy=f"give a number {wanted}")


def _deadline(started: float, deadline_ms: float | None) -> float | None:
    return None if deadline_ms is None else started + deadline_ms / 1000


def _version(kv_id: str, source: AdapterSource) -> str:
    contract = source.contract.model_dump_json() if source.contract is not None else ""
    return hashlib.sha256(f"{kv_id}\n{contract}".encode()).hexdigest()[:16]


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
