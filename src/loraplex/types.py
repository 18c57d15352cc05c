"""Requests and answers: plain frozen data, the same in Python and in JSON."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from loraplex.errors import InvalidRequestError, LoraplexError


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation. `role` is a key or a value of the contract's `roles`."""

    role: str
    content: str


Input = str | Iterable[Message | Mapping[str, str]]  # text, or messages with `role` and `content`


def conversation_of(given: Input) -> str | tuple[Message, ...]:
    """As a request has it. InvalidRequestError: neither text nor messages."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Iterable):
        raise InvalidRequestError(f"no conversation: {given!r}", remedy="give text, or messages")
    return tuple(_message(one) for one in given)


def _message(given: Message | Mapping[str, str]) -> Message:
    if isinstance(given, Message):
        return given
    try:
        return Message(role=given["role"], content=given["content"])
    except (KeyError, TypeError):
        raise InvalidRequestError(
            f"no message: {given!r}", remedy="give text, or messages with 'role' and 'content'"
        ) from None


Names = tuple[str, ...] | Literal["*"]


def classifier_names(given: str | Iterable[str]) -> Names:
    """A name, names, or "*", alone or as the only name, for every classifier."""
    names = (given,) if isinstance(given, str) else tuple(given)
    return "*" if names == ("*",) else names


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyRequest:
    """One conversation and the classifiers that shall judge it.

    input:        text, or the turns in order.
    classifiers:  names, in the order of the answer's verdicts, or "*" for every classifier.
    deadline_ms:  from the call; a classifier not computed by then answers `deadline_exceeded`.
    conversation_id:  the same for all turns of a conversation: keeps what was computed for its next turn.
    """

    input: str | tuple[Message, ...]
    classifiers: Names = "*"
    deadline_ms: float | None = None
    conversation_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """Which adapter answered. `version` is a hash of its weights, its config and its contract."""

    name: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    code: str
    message: str
    remedy: str

    @classmethod
    def of(cls, error: LoraplexError) -> "ErrorInfo":
        return cls(code=error.code, message=error.message, remedy=error.remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One classifier's answer: either `label` and what belongs to it, or `error`.

    id:          of this verdict, for feedback.
    classifier:  as it was asked: a classifier's name or a route's. `adapter` is who answered.
    confidence:  the returned label's score.
    scores:      label -> calibrated probability, summing to 1.
    label_mass:  the labels' share of the whole vocabulary, before calibration.
    abstained:   the score is below the contract's `abstain_below`; `label` is still the winner.
    Without a contract `label` is the decoded top token and `confidence` its probability.
    """

    id: str | None = None
    classifier: str
    label: str | None = None
    confidence: float | None = None
    scores: Mapping[str, float] | None = None
    label_mass: float | None = None
    abstained: bool = False
    adapter: AdapterRef | None = None
    warnings: tuple[str, ...] | None = None
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """prompt_tokens: asked for, over all classifiers. computed_tokens: run through the model.
    cached_tokens: the rest, computed for an earlier call or for another classifier in the same step."""

    prompt_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Milliseconds. queue: a sequence's longest wait; compute: the longest step that held one; total: all of it."""

    tokenize_ms: float = 0.0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyResult:
    id: str
    verdicts: tuple[Verdict, ...]
    usage: Usage
    timings: Timings

    def __getitem__(self, classifier: str) -> Verdict:
        """The verdict of `classifier`; KeyError where it was not asked."""
        for verdict in self.verdicts:
            if verdict.classifier == classifier:
                return verdict
        raise KeyError(classifier)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """In the place of an answer."""

    error: ErrorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """results: an answer or a failure for each conversation, in order. usage: of all. timings: each phase's longest;
    total: of the whole call."""

    results: tuple[ClassifyResult | Failure, ...]
    usage: Usage
    timings: Timings


MAX_TOP = 20  # likeliest tokens that a token may come with


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A prompt under an adapter or, with None, the bare base.

    prompt:        text, taken verbatim, special tokens parsed; or token ids; or messages: in the adapter's contract if
                   it has one, else in the base's chat template, special tokens in them kept as text.
    max_tokens:    None: up to what the base takes.
    temperature:   0 takes the likeliest token, else tokens are drawn from the smallest set of likeliest ones whose
                   probabilities add up to `top_p`.
    seed:          the same one draws the same tokens.
    stop:          texts of which the first one ends the answer and is no part of it.
    num_top:       likeliest tokens that come with each one, 20 at most.
    logit_bias:    token id -> -100 to 100, added before a token is chosen; its log probability is as without.
    allowed_token_ids:    where there are any, no other token is chosen.
    add_special_tokens:   to a prompt that is text, as the tokenizer does by itself.
    skip_special_tokens:  in the answer's text.
    chat_template_kwargs: variables of the base's chat template.
    conversation_id:      keeps what was computed for the conversation's next turn.
    """

    prompt: str | tuple[int, ...] | tuple[Message, ...]
    adapter: str | None = None
    max_tokens: int | None = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_top: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    add_special_tokens: bool = True
    skip_special_tokens: bool = False
    chat_template_kwargs: Mapping[str, bool | int | str] = field(default_factory=dict)
    conversation_id: str | None = None
    deadline_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelyToken:
    """text: of the token alone. utf8: its bytes, which may be a part of a character; None where they are not known.
    log_prob: over the whole vocabulary, before anything of the request changes it."""

    id: int
    text: str
    utf8: bytes | None
    log_prob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedToken:
    """As LikelyToken. offset: characters of the answer before it. top: the likeliest tokens in its place, `num_top` of
    them, likeliest first; it need not be among them."""

    id: int
    text: str
    utf8: bytes | None
    log_prob: float
    offset: int
    top: tuple[LikelyToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """tokens: what was generated, with the base's end-of-text token, or the tokens of a stop text, where they came
    ("stop"). text: without these. warnings: what of the prompt was not taken as it was given."""

    id: str
    text: str
    tokens: tuple[GeneratedToken, ...]
    finish_reason: Literal["stop", "length"]
    adapter: AdapterRef | None
    usage: Usage
    timings: Timings
    warnings: tuple[str, ...] = ()


# A token, and the text that became final with it: what may be the beginning of a stop text, or of a character, waits.
OnToken = Callable[[GeneratedToken, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """An adapter as the API lists it. What is None is not known before it has been read.

    state:      registered (not read yet), loading, ready, failed (never loaded; `error` says why) or draining.
    error:      why the last load failed; a version that was ready before goes on answering.
    num_bytes:  on the device.
    """

    name: str
    state: Literal["registered", "loading", "ready", "failed", "draining"] = "ready"
    version: str | None = None
    rank: int | None = None
    num_parameters: int | None = None
    num_bytes: int | None = None
    labels: tuple[str, ...] | None = None
    question: str | None = None
    path: str
    pinned: bool = False
    on_device: bool = True
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What can be named as a model. `parent` is the base; None for the base itself."""

    id: str
    parent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A backend now. adapters: name -> state. active: have requests; placing: have requests that wait for a place on
    the device. Since the start: num_reads: adapters read from disk; num_steps and what was in them."""

    num_waiting: int
    num_running: int
    num_blocks: int
    num_available_blocks: int
    adapters: Mapping[str, str]
    active: tuple[str, ...]
    placing: tuple[str, ...]
    num_slots: int
    max_slots: int
    device_bytes: int
    host_bytes: int
    num_reads: int
    num_steps: int
    num_step_tokens: int
    num_step_sequences: int
    step_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A name that leads to one of its adapters by weight.

    targets:   adapter -> weight; a target's share is its weight over all weights.
    shadows:   adapters that judge too; their answers are recorded and never returned.
    revision:  grows with each change of any route; one that was undone does not come again.
    """

    name: str
    targets: Mapping[str, float]
    shadows: tuple[str, ...] = ()
    revision: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """share: of the `num_compared` conversations that a shadow and a primary judged, those with the same label."""

    num_compared: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """share: of the `num_labelled` verdicts that feedback named a label for, those that are right; its 95 % interval is
    low to high."""

    num_labelled: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStats:
    """How a version of a route's target answered, over the verdicts that are kept. What is None was not observed.

    label_shares:     label -> its share of the verdicts.
    mean_confidence:  of the returned labels.
    """

    target: str
    version: str | None = None
    role: Literal["primary", "shadow"] = "primary"
    num_verdicts: int = 0
    num_errors: int = 0
    label_shares: Mapping[str, float] = field(default_factory=dict)
    mean_confidence: float | None = None
    latency_ms: Latency | None = None
    agreement: Agreement | None = None
    accuracy: Accuracy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteStats:
    name: str
    targets: tuple[TargetStats, ...]
