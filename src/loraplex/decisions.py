"""The answers to typed questions, made from labels' probabilities. Knows no wire format."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loraplex.types import PREDICATE_LABELS, AdapterRef, ErrorInfo, Question, QuestionType, Usage, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to one typed question: the fields of its type, or `error`, or `skipped_by`.

    probability:    of a predicate: that it holds.
    choice:         of a choice: the likeliest label.
    score:          of a score: the expected level, from 0, in the question's order.
    confidence:     of a choice or a score, from 0 (all labels are as likely) to 1, by TypeSafe's formulas.
    probabilities:  of a choice or a score: label -> probability, in the question's order.
    scores:         label -> probability, in the contract's order.
    label:          the verdict's label. It heeds the contract's `threshold`, which the fields above do not.
    verdict_id:     identifies the verdict, for feedback.
    adapter:        the adapter that answered; None where none was trained for the question.
    abstained, warnings, error, skipped_by:  the verdict's.
    """

    type: QuestionType
    probability: float | None = None
    choice: str | None = None
    score: float | None = None
    confidence: float | None = None
    probabilities: Mapping[str, float] | None = None
    scores: Mapping[str, float] | None = None
    label: str | None = None
    abstained: bool = False
    verdict_id: str | None = None
    adapter: AdapterRef | None = None
    warnings: tuple[str, ...] | None = None
    error: ErrorInfo | None = None
    skipped_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """The answers to typed questions about one state, by the questions' names."""

    answers: Mapping[str, Answer]
    usage: Usage

    def __getitem__(self, name: str) -> Answer:
        return self.answers[name]


def softmax(logits: Sequence[float]) -> list[float]:
    """Return the probabilities that are proportional to exp(logit)."""
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def expected_level(probabilities: Iterable[float]) -> float:
    """Return the expected level of a score, from 0. probabilities: of the levels, from the lowest to the highest."""
    return math.fsum(level * one for level, one in enumerate(probabilities))


def answer_of(question: Question, verdict: Verdict, more_warnings: tuple[str, ...] = ()) -> Answer:
    """Return what a verdict says to a typed question, whose labels are the verdict's, in any order."""
    scores = verdict.scores or {}
    probabilities = None if question.type == "predicate" else {label: scores[label] for label in question.labels}
    in_order = [*(probabilities or {}).values()]
    return Answer(
        type=question.type,
        probability=_holds(question, scores) if question.type == "predicate" else None,
        choice=max(question.labels, key=scores.__getitem__) if question.type == "choice" else None,
        score=expected_level(in_order) if question.type == "score" else None,
        confidence=None if question.type == "predicate" else CONFIDENCES[question.type](in_order),
        probabilities=probabilities,
        scores=scores,
        label=verdict.label,
        abstained=verdict.abstained,
        verdict_id=verdict.id,
        adapter=verdict.adapter,
        warnings=((verdict.warnings or ()) + more_warnings) or None,
    )


def _holds(question: Question, scores: Mapping[str, float]) -> float:
    """Return the probability that a predicate holds: that of the contract's first label, unless the question names the
    contract's labels in the other order. An adapter's labels come in any order out of its training data."""
    first = question.labels[0]
    is_own = question.labels != PREDICATE_LABELS and scores.keys() == set(question.labels)
    return scores[first] if is_own else next(iter(scores.values()))


def skipped(question: Question, gate: str) -> Answer:
    """Return the answer of a question whose gate said no."""
    return Answer(type=question.type, skipped_by=gate)


def failed(question: Question, verdict: Verdict, error: ErrorInfo) -> Answer:
    """Return the answer of a question that has none."""
    return Answer(type=question.type, verdict_id=verdict.id, adapter=verdict.adapter, error=error)


def choice_confidence(probabilities: Sequence[float]) -> float:
    """Return how far the likeliest of n options is above 1/n: (n p - 1) / (n - 1), TypeSafe's formula."""
    num = len(probabilities)
    return min(1.0, max(0.0, (num * max(probabilities) - 1) / (num - 1))) if num > 1 else 1.0


def score_confidence(probabilities: Sequence[float]) -> float:
    """Return how close to the likeliest level the others are: 1 - E|i - k| / D, or 0, with k the likeliest level and D
    the mean distance of n levels from their middle. TypeSafe's formula."""
    num = len(probabilities)
    if num < 2:
        return 1.0
    likeliest = probabilities.index(max(probabilities))
    spread = math.fsum(abs(level - likeliest) * one for level, one in enumerate(probabilities))
    most = sum(abs(level - (num - 1) / 2) for level in range(num)) / num
    return min(1.0, max(0.0, 1 - spread / most))


CONFIDENCES = {"choice": choice_confidence, "score": score_confidence}
