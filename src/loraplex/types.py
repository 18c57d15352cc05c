"""Requests and answers: plain frozen data, the same in Python and in JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loraplex.errors import LoraplexError


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A tool that an assistant called. arguments: JSON text, as the model wrote it."""

    id: str | None = None
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation. `role` is a key or a value of the contract's `roles`. Only chat templates see the
    other fields."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


Roles = Mapping[str, str | None]  # role -> the name written before the turn; None leaves the turn out
Input = str | Iterable[Message | Mapping[str, Any]]  # text, or messages as OpenAI's chat API has them

Names = tuple[str, ...] | Literal["*"]


def classifier_names(given: str | Iterable[str]) -> Names:
    """Return the names as requests hold them. "*", alone or as the only name, means every classifier."""
    names = (given,) if isinstance(given, str) else tuple(given)
    return "*" if names == ("*",) else names


QuestionType = Literal["predicate", "choice", "score"]
PREDICATE_LABELS = ("yes", "no")  # of a predicate that names none


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A typed question. The classifier or route of its name answers it, in the contract's own words. A name that is no
    classifier's is a question to the bare base, in these words (`--adhoc-questions`).

    type:          predicate (two labels: the first one holds or the second does), choice (one of the labels) or score
                   (labels are levels, from the lowest to the highest).
    instructions:  what is asked, in words.
    labels:        in the order of the request. Only a predicate may leave them out: its labels are then yes and no,
                   and the first label of the classifier's contract is the one that holds.
    descriptions:  label -> what it means; may be empty, or name some labels only.
    """

    type: QuestionType
    instructions: str
    labels: tuple[str, ...] = ()
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.type == "predicate" and self.labels == ():
            object.__setattr__(self, "labels", PREDICATE_LABELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyRequest:
    """One conversation, and the classifiers and questions that judge it.

    input:            text, or the turns in order.
    classifiers:      names, in the order of the answer's verdicts, or "*" for every classifier.
    deadline_ms:      milliseconds from the call; a classifier not computed by then answers `deadline_exceeded`.
    conversation_id:  the same for all turns of a conversation; keeps what was computed for the next turn.
    roles:            roles that differ from the contracts' `roles`.
    request_id:       kept with the verdicts, so that feedback can name the request instead of a verdict.
    key:              name of the API key that asks, kept with `request_id`.
    questions:        name -> a question for the bare base. Its verdict comes under this name, behind the classifiers'.
    cascade:          whether a classifier with a gate (`when` in loraplex.yaml) runs only if the gate says so.
    """

    input: str | tuple[Message, ...]
    classifiers: Names = "*"
    deadline_ms: float | None = None
    conversation_id: str | None = None
    roles: Roles | None = None
    request_id: str | None = None
    key: str | None = None
    questions: Mapping[str, Question] = field(default_factory=dict)
    cascade: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """The adapter that answered. `version` is a hash of its weights, its config and its contract."""

    name: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    """An error as data: see `LoraplexError`."""

    code: str
    message: str
    remedy: str

    @classmethod
    def of(cls, error: LoraplexError) -> "ErrorInfo":
        return cls(code=error.code, message=error.message, remedy=error.remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One classifier's answer: either `label` and the fields that describe it, or `error`, or `skipped_by`.

    id:          identifies the verdict, for feedback; None where it was skipped.
    classifier:  the name in the request: a classifier's, a route's or a question's.
    adapter:     the adapter that answered; None where the bare base answered a question (or nobody, with `error`).
    confidence:  score of the returned label.
    scores:      label -> calibrated probability; the sum is 1.
    value:       expected value of the contract's `values` under the scores; None where the contract has none.
    score:       expected level, from 0; None where the contract's `type` is not score.
    label_mass:  probability of all labels together, over the whole vocabulary, before calibration.
    abstained:   whether the score is below the contract's `abstain_below`; `label` is still the best one.
    warnings:    each is "code: sentence". The codes: left_out_tool_calls, escaped_special_tokens, cut_conversation,
                 low_label_mass, zero_shot (the bare base answered), gate_failed (it ran without its gate).
    skipped_by:  the gate that let the classifier not run; there is no answer.
    Without a contract or a score head, `label` is the decoded top token and `confidence` its probability.
    """

    id: str | None = None
    classifier: str
    label: str | None = None
    confidence: float | None = None
    scores: Mapping[str, float] | None = None
    value: float | None = None
    score: float | None = None
    label_mass: float | None = None
    abstained: bool = False
    adapter: AdapterRef | None = None
    warnings: tuple[str, ...] | None = None
    error: ErrorInfo | None = None
    skipped_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How many tokens a request took.

    prompt_tokens:    in the prompts of all classifiers.
    computed_tokens:  run through the model for this request.
    cached_tokens:    the rest: computed for an earlier call, or for another classifier in the same step.
    skipped_tokens:   about how many the prompts of skipped classifiers would have, by the mean of those that ran; None
                      where none was skipped.
    question_tokens:  those of the prompt tokens that are in prompts of questions to the bare base; None where none was
                      asked.
    """

    prompt_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    skipped_tokens: int | None = None
    question_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Milliseconds of a request's phases. For queue and compute the slowest sequence counts.

    tokenize_ms:  until all prompts were tokenized; includes loading an adapter that was not on the device.
    queue_ms:     from queueing to the first step.
    compute_ms:   from the start of the first step to the end of the last.
    """

    tokenize_ms: float = 0.0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyResult:
    """The answer to a ClassifyRequest: one verdict for each classifier, in the request's order."""

    id: str
    verdicts: tuple[Verdict, ...]
    usage: Usage
    timings: Timings

    def __getitem__(self, classifier: str) -> Verdict:
        """Return the verdict of `classifier`. Raises KeyError where the request did not ask it."""
        for verdict in self.verdicts:
            if verdict.classifier == classifier:
                return verdict
        raise KeyError(classifier)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error in place of an answer."""

    error: ErrorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """results: an answer or a failure for each conversation, in order. usage: the sum. timings: the longest of each
    phase; total: the whole call."""

    results: tuple[ClassifyResult | Failure, ...]
    usage: Usage
    timings: Timings


Owner = Literal["base", "adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """An adapter as the API lists it. Fields are None until the adapter has been read, or where they do not apply.

    state:      registered (not read yet), loading, ready, failed (never loaded; `error` says why) or draining.
    error:      why the last load failed; a version that was ready before still answers.
    warnings:   what is odd about the version that answers, such as another base in its config.
    num_bytes:  bytes on the device.
    type:       what the contract says is asked.
    template:   what writes the prompts of /v1/classify: the contract's `template`, the chat template, or nothing (None:
                the text is taken verbatim).
    chat_template, tokenizer:  whether they are the adapter's own, or the base's.
    """

    name: str
    state: Literal["registered", "loading", "ready", "failed", "draining"] = "ready"
    version: str | None = None
    rank: int | None = None
    num_parameters: int | None = None
    num_bytes: int | None = None
    labels: tuple[str, ...] | None = None
    type: QuestionType | None = None
    question: str | None = None
    path: str
    pinned: bool = False
    on_device: bool = True
    template: Literal["contract", "chat_template"] | None = None
    chat_template: Owner | None = None
    tokenizer: Owner | None = None
    error: ErrorInfo | None = None
    warnings: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A name that a request can give as its model. `parent` is the base; None for the base itself."""

    id: str
    parent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The state of a service now. `num_reads` and the fields about steps count since the start.

    num_waiting:           accepted evaluations that do not run yet.
    num_available_blocks:  K/V blocks that are free or can be evicted.
    adapters:              name -> state.
    active:                adapters with requests.
    placing:               adapters that are being placed in a slot.
    num_reads:             adapters read from disk.
    """

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
class Example:
    """A request whose text was kept (`--keep-inputs`), with labels of its verdicts.

    id:         the request's own; the ids of its verdicts begin with it.
    input:      text, or messages as a body holds them.
    labels:     requested name -> the label that feedback gave; without feedback, the one that was answered.
    corrected:  the names whose label feedback gave.
    conversation_id:  the request's, if it had one.
    """

    id: str
    input: str | tuple[dict[str, Any], ...]
    labels: Mapping[str, str]
    corrected: tuple[str, ...] = ()
    conversation_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """A page of examples, oldest first. after: gives the next page; None: this is the last one."""

    examples: tuple[Example, ...]
    after: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A name that leads to one of its adapters by weight.

    targets:   adapter -> weight; a target's share is its weight divided by the sum of all weights.
    shadows:   adapters that judge, too; their answers are recorded and never returned.
    revision:  increases with each change of any route. A revision that was rolled back is never used again.
    """

    name: str
    targets: Mapping[str, float]
    shadows: tuple[str, ...] = ()
    revision: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds of the requests that a target answered: mean and percentiles."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """share: part of the `num_compared` conversations that got the same label from a shadow and from its primary."""

    num_compared: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """share: part of the `num_labelled` verdicts with feedback whose label was right. `low` to `high` is the 95 %
    interval of the share."""

    num_labelled: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStats:
    """How a version of a route's target answered, over the verdicts that are kept. None means not observed.

    label_shares:     label -> its share of the verdicts.
    mean_confidence:  mean score of the returned labels.
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
    """The statistics of a route or a classifier: one entry for each version of each target."""

    name: str
    targets: tuple[TargetStats, ...]
