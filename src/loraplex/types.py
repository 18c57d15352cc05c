"""What crosses the seams: a request to classify and its answer. Plain frozen data, the same in Python and JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from loraplex.errors import LoraplexError


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation. `role` is a key or a value of the contract's `roles`."""

    role: str
    content: str


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
class AdapterInfo:
    """An adapter as the API lists it. What is None is not known before it has been read.

    state:      registered (not read yet), loading, ready, failed (never loaded; `error` says why) or draining.
    error:      why the last load failed; a version that was ready before goes on answering.
    num_bytes:  on the device.
    """

    name: str
    state: Literal["registered", "loading", "ready", "failed", "draining"] = "ready"
    version: str | None
    rank: int | None
    num_parameters: int | None
    num_bytes: int | None = None
    labels: tuple[str, ...] | None
    question: str | None
    path: str
    pinned: bool = False
    on_device: bool = True
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A backend now. adapters: name -> state. active: have requests; placing: have requests that wait for a place on
    the device. num_reads: adapters read from disk so far."""

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
