"""A classifier's contract (`classifier.yaml`), and its decision from label log probabilities. Knows no tokenizer."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loraplex.config import read_yaml, validate
from loraplex.decisions import expected_level, softmax
from loraplex.errors import ContractError, InvalidRequestError, quoted, shortened
from loraplex.problems import NumbersAreNoBooleans, wrong
from loraplex.types import Message, QuestionType, Roles, Verdict

CONVERSATION, QUESTION = "{conversation}", "{question}"
DEFAULT_ROLES: Roles = {"user": "Customer", "assistant": "Agent"}
# Unicode's line ends. Word writes a VT for a line break, and PDFs have an FF between pages.
_LINE_ENDS = re.compile("\r+\n|[\r\v\f\x85\u2028\u2029]")  # a file written twice in text mode has \r\r\n
_BRACES = re.compile(r"(\{+)(\s*(\w+)\s*)\}")

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Calibration(NumbersAreNoBooleans):
    """How label log probabilities become scores: softmax((log p + bias) / temperature) over the labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(1.0, ge=1e-3, le=1e3)
    bias: dict[str, Annotated[float, Field(ge=-1e3, le=1e3)]] = Field(default_factory=dict)


class Golden(BaseModel):
    """An example text whose label is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    label: str


class Contract(NumbersAreNoBooleans):
    """How a classifier is asked, and how its answer is read. Versions are identified by the keys that are not at their
    default, so a default never changes: a key with another one gets a new name.

    format:         lines: messages are written as lines `Name: content`, and stand in the template or in one user
                    message of the chat template. chat: each is a message of the chat template, and the question is a
                    last message of the user.
    answer_start:   what the model writes before the label, such as the quote of a JSON text. It is given to the model.
    labels:         in order. Of a predicate the first is the one that holds; of a score they are levels, from the
                    lowest to the highest.
    type:           what is asked: whether something holds (predicate), which of several (choice), or how much (score).
                    By default two labels are a predicate, and more are a choice.
    descriptions:   label -> what it means, in words. They are shown to people and clients, and change no prompt.
    values:         label -> the number that it stands for; verdicts then have an expected value.
    threshold:      only with two labels: answer labels[0] where its score is at least this.
    abstain_below:  mark a verdict as abstained where its label's score is lower.
    min_label_mass: warn where all labels together are less probable; 0 never warns.
    max_length:     maximum tokens of the whole prompt; a longer conversation loses its oldest turns.
    roles:          message role -> the name written before the turn; null leaves the role's turns out.
                    `format: chat` knows only null.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str | None = None
    template: str | None = None
    format: Literal["lines", "chat"] = "lines"
    answer_start: str = ""
    labels: tuple[str, ...]
    type: QuestionType | None = None
    descriptions: dict[str, str] | None = None
    values: dict[str, Annotated[float, Field(ge=-1e9, le=1e9)]] | None = None
    threshold: Probability | None = None
    abstain_below: Probability = 0.0
    min_label_mass: Probability = 0.05
    calibration: Calibration = Calibration()
    max_length: int | None = Field(None, ge=8)
    roles: dict[str, str | None] = Field(default_factory=lambda: dict(DEFAULT_ROLES))
    golden: tuple[Golden, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        labels, said = self.labels, quoted(self.labels)
        if len(labels) < 2:
            raise wrong(f"'labels' needs at least two, got {said}", "name them: labels: ['yes', 'no']")
        if len(set(labels)) != len(labels) or "" in labels:
            raise wrong(f"'labels' must be distinct and not empty, got {said}", "name each label once")
        if self.type == "predicate" and len(labels) != 2:
            raise wrong(
                f"'type' is 'predicate', which has two labels, and there are {len(labels)}",
                "write type: choice, or type: score for labels that are levels",
            )
        for label in self.descriptions or ():
            if label not in labels:
                raise wrong(
                    f"'descriptions' names {quoted(label)}, which is not among the labels {said}", "use a label's text"
                )
        if self.threshold is not None and len(labels) != 2:
            raise wrong(f"'threshold' needs exactly two labels, there are {len(labels)}", "remove 'threshold'")
        for label in self.calibration.bias:
            if label not in labels:
                raise wrong(
                    f"'calibration.bias' names {quoted(label)}, which is not among the labels {said}",
                    "use a label's text",
                )
        if self.values is not None and self.values.keys() != set(labels):
            raise wrong(
                f"'values' names {quoted(tuple(self.values))}, and the labels are {said}", "give each label a number"
            )
        for golden in self.golden:
            if golden.label not in labels:
                raise wrong(
                    f"'golden' expects {quoted(golden.label)}, which is not among the labels {said}",
                    "use a label's text",
                )
        if self.template is not None:
            if self.template.count(CONVERSATION) != 1:
                raise wrong(f"'template' must hold {CONVERSATION} exactly once", f"write {CONVERSATION} in it once")
            if self.template.count(QUESTION) > 1:
                raise wrong(f"'template' may hold {QUESTION} only once", f"remove the other {QUESTION}")
            if QUESTION in self.template and self.question is None:
                raise wrong(f"'template' holds {QUESTION}, but there is no 'question'", "add the key 'question'")
            _check_placeholders(self.template)
            if QUESTION not in self.template and self.question is not None:
                raise wrong(
                    f"'question' is given, but 'template' does not hold {QUESTION}",
                    f"write {QUESTION} in the template, or remove 'question'",
                )
            if self.format == "chat":
                raise wrong("'format' is 'chat', and there is a 'template' too", "remove one of them")
        if self.format == "lines" and not any(self.roles.values()):
            what = "leaves every message out" if self.roles else "is empty"
            raise wrong(f"'roles' {what}", "remove it, or name a role: roles: {user: Customer}")
        return self

    @property
    def question_type(self) -> QuestionType:
        """The type of the question: `type`, or what the number of labels says."""
        return self.type or ("predicate" if len(self.labels) == 2 else "choice")

    def decide(self, log_probs: Sequence[float]) -> "Decision":
        """Return the decision from label log probabilities.

        log_probs:  log probability of each label, in the order of `labels`, over the whole vocabulary."""
        bias = self.calibration.bias
        logits = [
            (log_prob + bias.get(label, 0.0)) / self.calibration.temperature
            for label, log_prob in zip(self.labels, log_probs, strict=True)
        ]
        scores = softmax(logits)
        if len(self.labels) == 2:
            winner = 0 if scores[0] >= (0.5 if self.threshold is None else self.threshold) else 1
        else:
            winner = max(range(len(scores)), key=scores.__getitem__)
        label_mass = min(1.0, math.fsum(math.exp(log_prob) for log_prob in log_probs))
        return Decision(
            label=self.labels[winner],
            confidence=scores[winner],
            scores=dict(zip(self.labels, scores, strict=True)),
            value=None
            if self.values is None
            else math.fsum(score * self.values[label] for label, score in zip(self.labels, scores, strict=True)),
            score=expected_level(scores) if self.type == "score" else None,
            label_mass=label_mass,
            abstained=scores[winner] < self.abstain_below,
            warnings=(low_mass(label_mass, self.min_label_mass),) if label_mass < self.min_label_mass else (),
        )


def _check_placeholders(template: str) -> None:
    """Refuse what was probably meant as a placeholder. Other braces are text, such as JSON."""
    for braces, inner, name in _BRACES.findall(template):
        known = difflib.get_close_matches(name.lower(), ("conversation", "question"), 1, 0.7)
        if known and braces + inner != "{" + known[0]:
            raise wrong(f"'template' holds {quoted(braces + inner + '}' * len(braces))}", f"write {{{known[0]}}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The part of a verdict that the contract decides. The fields are those of `types.Verdict`."""

    label: str
    confidence: float
    scores: Mapping[str, float]
    value: float | None
    score: float | None
    label_mass: float
    abstained: bool
    warnings: tuple[str, ...]

    def verdict(self, classifier: str) -> Verdict:
        """Return the classifier's verdict."""
        return Verdict(
            classifier=classifier,
            label=self.label,
            confidence=self.confidence,
            scores=self.scores,
            value=self.value,
            score=self.score,
            label_mass=self.label_mass,
            abstained=self.abstained,
            warnings=self.warnings or None,
        )


def low_mass(label_mass: float, least: float) -> str:
    """Return the warning that the labels are not what the model expects."""
    return (
        f"low_label_mass: the labels have a probability of {label_mass:.2g} together, "
        f"less than min_label_mass {least:g}; the model expects another text here, so the scores say little"
    )


def read_contract(path: Path) -> Contract:
    """Read a `classifier.yaml`. Raises ContractError, which names the file, the key and the remedy."""
    return validate(Contract, read_yaml(path, ContractError), path, ContractError)


def conversation_text(conversation: str | Sequence[Message], roles: Roles) -> str:
    """Return the conversation as text: one normalized `Name: content` a message. Text is returned unchanged. A message
    that only calls tools, and one whose role has the name None, has no line.

    Raises InvalidRequestError for an unknown role, and where the conversation is empty."""
    if isinstance(conversation, str):
        text = conversation
    else:
        said = [
            (name, one.content) for name, one in kept_messages(conversation, roles) if one.content or not one.tool_calls
        ]
        text = "\n".join(normalized(f"{name}: {content}") for name, content in said)
        if not any(content.strip() for _, content in said):
            text = ""
    if not text.strip():
        raise InvalidRequestError("the input is empty", remedy="send the text or the messages to classify")
    return valid_unicode(text)


def kept_messages(conversation: Sequence[Message], roles: Roles) -> list[tuple[str, Message]]:
    """Return (name, message) for each message whose role has a name. Raises InvalidRequestError for an unknown role."""
    names = {
        **{name.lower(): name for name in roles.values() if name is not None},
        **{key.lower(): name for key, name in roles.items()},
    }
    for message in conversation:
        if message.role.lower() not in names:
            raise _unknown_role(message.role, roles)
    named = ((names[message.role.lower()], message) for message in conversation)
    return [(name, message) for name, message in named if name is not None]


def normalized(text: str) -> str:
    """Return `text` with `\\n` for every line end, without a byte order mark, and without whitespace at its end. These
    depend on the way that a text took, not on its words, and change a verdict."""
    return _LINE_ENDS.sub("\n", text.removeprefix("\ufeff")).rstrip()


def _unknown_role(role: str, roles: Roles) -> InvalidRequestError:
    role = shortened(role)
    named = ", ".join(f"{key}: {'null' if name is None else name}" for key, name in roles.items())
    return InvalidRequestError(
        f"unknown role {quoted(role)}",
        remedy=f"use one of: {', '.join(roles)}; or say what becomes of its turns, in the adapter's classifier.yaml "
        f"(`roles: {{{named}, {role}: {role.title()}}}` writes them, `{role}: null` leaves them out) "
        f'or in the request (`"roles": {{"{role}": null}}`)',
    )


def valid_unicode(text: str) -> str:
    """Return `text`. Raises InvalidRequestError for a lone surrogate, which JSON can encode and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidRequestError(
            f"the input holds {text[exc.start]!r} at character {exc.start}, which is not valid Unicode",
            remedy="send valid UTF-8, and characters beyond U+FFFF as whole surrogate pairs",
        ) from None
    return text
