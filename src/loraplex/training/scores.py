"""How well a classifier does on labelled conversations, from the scores that it gave."""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Of one classifier. f1 and auc: of the first label, the positive one; with more than two labels their mean over
    all labels. None where the truth has one label only. log_loss: in nats."""

    n: int
    accuracy: float
    f1: float | None
    auc: float | None
    log_loss: float


def quality(scores: Seq[Seq[float]], truth: Seq[int], decided: Seq[int]) -> Quality:
    """Return the figures of one classifier.

    scores:   [n, labels] probabilities.
    truth:    [n] the right label's index.
    decided:  [n] the label that the contract chose, by its threshold.
    """
    from sklearn.metrics import f1_score, roc_auc_score

    table, right = numpy.asarray(scores), numpy.asarray(truth)
    labels = [0] if table.shape[1] == 2 else sorted(set(truth))
    has_both = len(set(truth)) > 1
    f1s = [f1_score(right == label, numpy.asarray(decided) == label, zero_division=0.0) for label in labels]
    aucs = [roc_auc_score(right == label, table[:, label]) for label in labels] if has_both else []
    chosen = table[numpy.arange(len(right)), right]
    return Quality(
        n=len(right),
        accuracy=float(numpy.mean(right == numpy.asarray(decided))),
        f1=float(numpy.mean(f1s)) if has_both else None,
        auc=float(numpy.mean(aucs)) if aucs else None,
        log_loss=-math.fsum(numpy.log(numpy.maximum(chosen, 1e-12)).tolist()) / len(right),
    )
