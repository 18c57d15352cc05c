"""How well a classifier answers labelled conversations, as single figures. None stands where the data cannot tell."""

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[numpy.float64]
Integers = NDArray[numpy.int64]
Booleans = NDArray[numpy.bool_]
LEAST_SCORE = 1e-12  # of the right label in a log-loss, which one score of 0 would make infinite


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Of one classifier. f1, auc: of the first label, the positive one; with more than two labels their mean over those
    that occur. log_loss: in nats."""

    n: int
    accuracy: float
    f1: float | None
    auc: float | None
    log_loss: float


def quality(scores: Seq[Seq[float]], truth: Seq[int], answered: Seq[int]) -> Quality:
    """Return the figures of one classifier on one conversation or more.

    scores:    [n, labels] probabilities.
    truth:     [n] the right label's index.
    answered:  [n] the index of the label that the contract chose, by its threshold.
    """
    table, right = numpy.asarray(scores, dtype=float), numpy.asarray(truth, dtype=numpy.int64)
    confusion = confusion_of(truth, answered, table.shape[1])
    counted = positives(table.shape[1])
    return Quality(
        n=len(right),
        accuracy=float(confusion.trace() / len(right)),
        f1=mean_of(f1(confusion, label) for label in counted),
        auc=mean_of(auc(table[:, label], right == label) for label in counted),
        log_loss=log_loss(table, right),
    )


def positives(num_labels: int) -> range:
    """Return the labels that precision, recall, F1 and AUC are of: the first of two. Of more it is each of them, and
    the figure is the mean over those that have one."""
    return range(1 if num_labels == 2 else num_labels)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None where none is."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def confusion_of(truth: Seq[int], answered: Seq[int], num_labels: int) -> Integers:
    """Return [right label, answered label] conversations."""
    confusion = numpy.zeros((num_labels, num_labels), dtype=numpy.int64)
    numpy.add.at(confusion, (numpy.asarray(truth, dtype=numpy.int64), numpy.asarray(answered, dtype=numpy.int64)), 1)
    return confusion


def f1(confusion: Integers, label: int) -> float | None:
    """Return a label's F1; None where it is right nowhere."""
    right, said = int(confusion[label].sum()), int(confusion[:, label].sum())
    return 2 * int(confusion[label, label]) / (right + said) if right else None


def auc(scores: ArrayLike, is_right: ArrayLike) -> float | None:
    """Return the area under the ROC curve. It is the share of pairs of a conversation with the label and one without in
    which the first has the higher score; ties count half."""
    values, positive = numpy.asarray(scores, dtype=float), numpy.asarray(is_right, dtype=bool)
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return None
    _, group = numpy.unique(values, return_inverse=True)  # ascending: one group for each distinct score
    with_it, without = numpy.bincount(group, positive), numpy.bincount(group, ~positive)
    below = numpy.cumsum(without) - without
    return float((with_it * (below + without / 2)).sum() / (num_positive * num_negative))


def log_loss(scores: Floats, truth: Integers) -> float:
    """Return the mean over conversations of -log(the right label's score), in nats."""
    chosen = scores[numpy.arange(len(truth)), truth]
    return -math.fsum(numpy.log(numpy.maximum(chosen, LEAST_SCORE)).tolist()) / len(truth)
