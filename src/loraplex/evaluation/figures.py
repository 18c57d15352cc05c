"""The figures of one classifier on labelled conversations, with intervals that hold the truth in 95 of 100 samples."""

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields

import numpy

from loraplex.evaluation.quality import (
    Booleans,
    Floats,
    Integers,
    auc,
    confusion_of,
    f1,
    log_loss,
    mean_of,
    positives,
)
from loraplex.measuring.samples import Z, wilson

BINS = 10
HALVINGS = 60  # until a bound is as exact as a float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A value with its interval; None where the data cannot tell it."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The figures of one classifier.

    n:              conversations with a label for it that it answered.
    num_failed:     those that it did not answer.
    precision, recall, f1, auc: of the first label, the positive one; with more labels, their mean over the labels that
                    have one. The interval of such a mean is the mean of the labels' intervals, which is too wide rather
                    than too narrow.
    log_loss:       in nats.
    brier:          mean over conversations of the squared distance between scores and truth, summed over labels.
    ece:            expected calibration error: how far the confidence of 10 bins is from their accuracy, on average.
    confusion:      [right label][answered label] conversations.
    coverage:       share of the conversations that `abstain_below` lets through.
    wrong_above_gate: share of wrong answers among those.
    """

    labels: tuple[str, ...]
    n: int
    num_failed: int
    accuracy: Figure
    precision: Figure
    recall: Figure
    f1: Figure
    auc: Figure
    log_loss: float | None
    brier: float | None
    ece: float | None
    confusion: tuple[tuple[int, ...], ...]
    coverage: Figure
    wrong_above_gate: Figure


# The figures that are one number, in the order in which reports show them.
NUMBERS = tuple(one.name for one in fields(Figures) if one.name not in ("labels", "n", "num_failed", "confusion"))


def figures_of(
    labels: Seq[str],
    truth: Seq[int],
    scores: Seq[Seq[float]],
    answered: Seq[int],
    abstained: Seq[bool],
    *,
    num_failed: int = 0,
) -> Figures:
    """Return a classifier's figures.

    labels:     the contract's, the positive one first.
    truth:      [n] index of the right label.
    scores:     [n, labels] probabilities.
    answered:   [n] index of the label that the classifier answered.
    abstained:  [n] whether the contract marked the verdict as abstained.
    """
    right, said = numpy.asarray(truth, dtype=numpy.int64), numpy.asarray(answered, dtype=numpy.int64)
    table = numpy.asarray(scores, dtype=float).reshape(len(right), len(labels))
    kept = ~numpy.asarray(abstained, dtype=bool)
    confusion = confusion_of(truth, answered, len(labels))
    counted = positives(len(labels))
    one_hot = numpy.eye(len(labels))[right]
    return Figures(
        labels=tuple(labels),
        n=len(right),
        num_failed=num_failed,
        accuracy=_share(int((right == said).sum()), len(right)),
        precision=_mean(_share(int(confusion[one, one]), int(confusion[:, one].sum())) for one in counted),
        recall=_mean(_share(int(confusion[one, one]), int(confusion[one].sum())) for one in counted),
        f1=_mean(_f1(confusion, one) for one in counted),
        auc=_mean(_auc(table[:, one], right == one) for one in counted),
        log_loss=log_loss(table, right) if len(right) else None,
        brier=float(((table - one_hot) ** 2).sum(1).mean()) if len(right) else None,
        ece=_ece(table, right, said) if len(right) else None,
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        coverage=_share(int(kept.sum()), len(right)),
        wrong_above_gate=_share(int((kept & (right != said)).sum()), int(kept.sum())),
    )


def bins_of(scores: Floats, is_right: Booleans) -> list[tuple[float, float, int]]:
    """Return (mean score, share that is right, conversations) of each of 10 bins that holds any, by score."""
    numbers = numpy.minimum((scores * BINS).astype(int), BINS - 1)
    here = (numbers == number for number in range(BINS))
    return [(float(scores[of].mean()), float(is_right[of].mean()), int(of.sum())) for of in here if of.any()]


def _share(part: int, whole: int) -> Figure:
    if not whole:
        return Figure(value=None)
    low, high = wilson(part, whole)
    return Figure(value=part / whole, low=low, high=high)


def _f1(confusion: Integers, label: int) -> Figure:
    """F1 is 2j / (1 + j), where j is a share: of the conversations that have the label or were given it, those with
    both. So its interval follows from j's."""
    value = f1(confusion, label)
    if value is None:
        return Figure(value=None)
    both = int(confusion[label, label])
    low, high = wilson(both, int(confusion[label].sum() + confusion[:, label].sum()) - both)
    return Figure(value=value, low=2 * low / (1 + low), high=2 * high / (1 + high))


def _auc(scores: Floats, is_right: Booleans) -> Figure:
    """Newcombe's interval (2006, method 5), which does not shrink to a point where the labels are told apart without a
    mistake: its bounds are as far from the value as the standard error that they themselves would have."""
    value = auc(scores, is_right)
    if value is None:
        return Figure(value=None)
    num, other = int(is_right.sum()), int((~is_right).sum())

    def reach(area: float) -> float:
        more = ((num + other) / 2 - 1) * ((1 - area) / (2 - area) + area / (1 + area))
        return Z * math.sqrt(area * (1 - area) * (1 + more) / (num * other))

    def bound(end: float) -> float:
        """Return the point between the value and an end of 0 to 1 at which the value is just within reach."""
        within, beyond = value, end
        for _ in range(HALVINGS):
            middle = (within + beyond) / 2
            within, beyond = (middle, beyond) if abs(value - middle) <= reach(middle) else (within, middle)
        return within

    return Figure(value=value, low=bound(0.0), high=bound(1.0))


def _mean(found: Iterable[Figure]) -> Figure:
    known = [one for one in found if one.value is not None]
    return Figure(
        value=mean_of(one.value for one in known),
        low=mean_of(one.low for one in known),
        high=mean_of(one.high for one in known),
    )


def _ece(scores: Floats, right: Integers, said: Integers) -> float:
    confidence = scores[numpy.arange(len(said)), said]
    bins = bins_of(confidence, right == said)
    return math.fsum(abs(mean - share) * num for mean, share, num in bins) / len(said)
