"""The figures of one classifier on labelled conversations, with intervals that hold the truth in 95 of 100 samples."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

RESAMPLES, LEVEL, BINS = 1000, 0.95, 10

Floats = NDArray[numpy.float64]
Integers = NDArray[numpy.int64]


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
                    occur.
    brier:          mean over conversations of the squared distance between scores and truth, summed over labels.
    ece:            expected calibration error: how far the confidence of 10 bins is from their accuracy, on average.
    confusion:      [true label][answered label] conversations.
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


def figures_of(
    labels: Seq[str],
    truth: Seq[int],
    scores: Seq[Seq[float]],
    answered: Seq[int],
    abstained: Seq[bool],
    *,
    num_failed: int = 0,
    seed: int = 0,
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
    confusion = numpy.zeros((len(labels), len(labels)), dtype=int)
    numpy.add.at(confusion, (right, said), 1)
    positives = range(1) if len(labels) == 2 else range(len(labels))

    def of_labels(figure: Callable[[Integers, Integers, Floats, int], float | None]) -> Figure:
        def mean(rows: Integers) -> float | None:
            found = [
                value
                for label in positives
                if (value := figure(right[rows], said[rows], table[rows], label)) is not None
            ]
            return float(numpy.mean(found)) if found else None

        return _bootstrapped(mean, len(right), seed)

    chosen = numpy.clip(table[numpy.arange(len(right)), right], 1e-12, 1.0)
    one_hot = numpy.eye(len(labels))[right]
    return Figures(
        labels=tuple(labels),
        n=len(right),
        num_failed=num_failed,
        accuracy=_share(int((right == said).sum()), len(right)),
        precision=of_labels(_precision),
        recall=of_labels(_recall),
        f1=of_labels(_f1),
        auc=of_labels(_auc),
        log_loss=float(-numpy.log(chosen).mean()) if len(right) else None,
        brier=float(((table - one_hot) ** 2).sum(1).mean()) if len(right) else None,
        ece=_ece(table, right, said) if len(right) else None,
        confusion=tuple(tuple(map(int, row)) for row in confusion),
        coverage=_share(int(kept.sum()), len(right)),
        wrong_above_gate=_share(int((kept & (right != said)).sum()), int(kept.sum())),
    )


def _share(part: int, whole: int) -> Figure:
    """Return a share with Wilson's interval."""
    from scipy.stats import binomtest

    if not whole:
        return Figure(value=None)
    interval = binomtest(part, whole).proportion_ci(LEVEL, method="wilson")
    return Figure(value=part / whole, low=float(interval.low), high=float(interval.high))


def _bootstrapped(figure: Callable[[Integers], float | None], n: int, seed: int) -> Figure:
    """Return a figure with the interval of its values on samples drawn with replacement."""
    value = figure(numpy.arange(n)) if n else None
    if value is None:
        return Figure(value=None)
    draw = numpy.random.default_rng(seed)
    found = [one for _ in range(RESAMPLES) if (one := figure(draw.integers(0, n, n))) is not None]
    low, high = numpy.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Figure(value=value, low=float(low), high=float(high))


def _precision(right: Integers, said: Integers, scores: Floats, label: int) -> float | None:
    num_said = int((said == label).sum())
    return float(((said == label) & (right == label)).sum() / num_said) if num_said else None


def _recall(right: Integers, said: Integers, scores: Floats, label: int) -> float | None:
    num_right = int((right == label).sum())
    return float(((said == label) & (right == label)).sum() / num_right) if num_right else None


def _f1(right: Integers, said: Integers, scores: Floats, label: int) -> float | None:
    if not (right == label).any():
        return None
    both = int(((said == label) & (right == label)).sum())
    return 2 * both / int((said == label).sum() + (right == label).sum())


def _auc(right: Integers, said: Integers, scores: Floats, label: int) -> float | None:
    """Return the share of pairs of a positive and a negative in which the positive has the higher score; ties count
    half."""
    from scipy.stats import rankdata

    positive = right == label
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return None
    ranks = rankdata(scores[:, label])
    return float((ranks[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def _ece(scores: Floats, right: Integers, said: Integers) -> float:
    confidence = scores[numpy.arange(len(said)), said]
    bins = numpy.minimum((confidence * BINS).astype(int), BINS - 1)
    total = 0.0
    for number in range(BINS):
        here = bins == number
        if here.any():
            total += abs(float(confidence[here].mean()) - float((right == said)[here].mean())) * float(here.mean())
    return total
