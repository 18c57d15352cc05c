"""Holds a question to a system and its reply, as frozen data that crosses processes as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loraplex.client import call as api
from loraplex.errors import OverloadedError
from loraplex.messages import conversation_of
from loraplex.types import ClassifyResult, Message

Status = Literal["ok", "refused", "failed", "timeout"]
OVERLOADED = {one.code for one in OverloadedError.__subclasses__()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request: some classifiers about one conversation.

    input:            text, or the turns in order.
    conversation_id:  the same for all turns of a conversation; None keeps nothing for a next turn.
    """

    input: str | tuple[Message, ...]
    classifiers: tuple[str, ...]
    conversation_id: str | None = None

    @property
    def body(self) -> Mapping[str, Any]:
        """The body of POST /v1/classify."""
        found = api.classify(self.input, self.classifiers, self.conversation_id, None, cascade=False).body
        assert found is not None, "a classification has a body"
        return found

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> "Call":
        return cls(
            input=conversation_of(body["input"]),
            classifiers=tuple(body["classifiers"]),
            conversation_id=body.get("conversation_id"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One classifier's verdict. scores: label -> probability. label_mass: the probability of all labels together.
    Fields are None where the system does not tell them."""

    label: str
    scores: Mapping[str, float] | None = None
    label_mass: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Holds what a system made of a call.

    status:           refused: the system was too busy (429, 503). failed: not all classifiers gave a verdict.
    error:            a code or a status, where the call was not answered.
    prompt_tokens:    asked for: in the prompts of all classifiers.
    computed_tokens:  run through the model; the rest (`cached_tokens`) was computed before, or for another classifier.
    engine_ms:        what the system says that it took; None where it does not say.
    is_cut:           a prompt was too long, and lost its oldest turns.
    """

    status: Status
    error: str | None = None
    verdicts: Mapping[str, Answer] = field(default_factory=dict)
    prompt_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    engine_ms: float | None = None
    is_cut: bool = False

    @classmethod
    def of(cls, result: ClassifyResult) -> "Reply":
        """Return the reply that holds a result's verdicts. A verdict with an error makes it a failed one."""
        usage = result.usage
        wrong = next((one.error.code for one in result.verdicts if one.error is not None), None)
        return cls(
            status="ok" if wrong is None else "refused" if wrong in OVERLOADED else "failed",
            error=wrong,
            verdicts={
                one.classifier: Answer(
                    label=one.label,
                    scores=None if one.scores is None else dict(one.scores),
                    label_mass=one.label_mass,
                )
                for one in result.verdicts
                if one.label is not None
            },
            prompt_tokens=usage.prompt_tokens,
            computed_tokens=usage.computed_tokens,
            cached_tokens=usage.cached_tokens,
            engine_ms=result.timings.total_ms,
            is_cut=any(
                warning.startswith("cut_conversation") for one in result.verdicts for warning in one.warnings or ()
            ),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Reply":
        verdicts = {name: Answer(**one) for name, one in given["verdicts"].items()}
        return cls(**{**given, "verdicts": verdicts})
