"""Chooses a contract's threshold and its abstain gate from scores whose labels are known."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy

from loraplex.classifier import Contract
from loraplex.errors import ConfigurationError
from loraplex.evaluation.quality import Floats

LEAST = 10  # conversations of each of two labels, without which nothing is fitted
DIGITS = 6  # of a threshold in a contract
ROUNDING = 1e-9  # of sums
# Labels of the rarer kind that say as much of a threshold as calibrated scores do. On the demo's 16 classifiers, with
# 80 and 150 conversations each, thresholds by labels alone lost 0.005 F1 on other conversations; these gain 0.001.
WORTH = 100.0
NUMBERS = {"precision-at-recall": 1.0, "recall-at-precision": 1.0, "cost": 1e6}  # objective -> its largest number
OBJECTIVES = "f1, precision-at-recall=R, recall-at-precision=P, cost=RATIO or none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Says what a threshold should be best at.

    kind:    f1; precision-at-recall: the highest precision whose recall is at least `number`; recall-at-precision: the
             other way round; cost: the lowest cost, where a missed positive costs `number` false alarms; none: the
             threshold stays as it is.
    """

    kind: str
    number: float = 0.0

    def values(self, found: Floats, said: Floats, num: int) -> Floats:
        """Return how good some thresholds are; -inf for one that the objective does not allow.

        found:  [thresholds] conversations that are rightly answered with the positive label.
        said:   [thresholds] conversations that are answered with it.
        num:    conversations that have it.
        """
        precision, recall = found / numpy.maximum(said, 1), found / max(num, ROUNDING)
        if self.kind == "f1":
            return 2 * found / (said + num)
        if self.kind == "precision-at-recall":
            return numpy.where(recall >= self.number - ROUNDING, precision, -numpy.inf)
        if self.kind == "recall-at-precision":
            return numpy.where((precision >= self.number - ROUNDING) & (said > 0), recall, -numpy.inf)
        return -((said - found) + self.number * (num - found))


def read_objective(given: str) -> Objective:
    """Return the objective that an option names. Raises ConfigurationError for another text."""
    kind, separator, number = given.partition("=")
    if kind in ("f1", "none") and not separator:
        return Objective(kind=kind)
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0 < value <= NUMBERS.get(kind, 0.0):
        what = "is unknown" if kind not in NUMBERS else f"has no number above 0 and at most {NUMBERS[kind]:g}"
        raise ConfigurationError(f"--objective {given}", what, remedy=f"give {OBJECTIVES}")
    return Objective(kind=kind, number=value)


def fit_threshold(
    contract: Contract, log_probs: Seq[Seq[float]], truth: Seq[int], objective: Objective
) -> float | None:
    """Return the threshold that is best for a contract of two labels; None where none does what the objective asks.

    log_probs:  [n, 2] log probabilities of the labels, which the contract's calibration makes scores of.
    truth:      [n] index of the right label.
    """
    scores = [contract.decide(one).scores[contract.labels[0]] for one in log_probs]
    return choose_threshold(scores, believed([one == 0 for one in truth], scores), objective)


def choose_threshold(scores: Seq[float], positive: Seq[float], objective: Objective) -> float | None:
    """Return the threshold that is best for the objective; of several, the one nearest to 0.5. None where no threshold
    does what the objective asks.

    scores:    [n] score of the positive label.
    positive:  [n] whether it is right: 1 or 0, or how likely that is. Not all are 0.
    """
    values, right = _falling(scores, positive)
    cuts = _cuts(values)
    thresholds = _between(values)[cuts]
    good = objective.values(numpy.append(0.0, numpy.cumsum(right))[cuts], cuts.astype(float), right.sum())
    if good.max() == -numpy.inf:
        return None
    best = thresholds[good >= good.max() - ROUNDING]
    return round(float(best[numpy.abs(best - 0.5).argmin()]), DIGITS)


def choose_gate(confidences: Seq[float], is_right: Seq[bool], most_wrong: float) -> float | None:
    """Return the lowest `abstain_below` above which at most a share `most_wrong` of the answers is wrong; 0 where
    nothing has to be marked. None where even the surest answers are wrong more often.

    confidences:  [n] score of the answered label.
    is_right:     [n] whether it is right.
    """
    values, right = _falling(confidences, is_right)
    cuts = _cuts(values)
    cuts = cuts[cuts > 0]  # something is let through
    wrong = numpy.cumsum(1 - right)[cuts - 1] / cuts
    allowed = cuts[wrong <= most_wrong + ROUNDING]
    if not len(allowed):
        return None
    kept = int(allowed.max())
    return 0.0 if kept == len(values) else round(float(_between(values)[kept]), DIGITS)


def believed(is_positive: Seq[bool], scores: Seq[float]) -> list[float]:
    """Return how likely the positive label is, by the known label and by the calibrated score. The fewer labels of the
    rarer kind are known, the more the scores count: what few labels say of a threshold is mostly chance."""
    rarer = min(sum(is_positive), len(is_positive) - sum(is_positive))
    share = rarer / (rarer + WORTH)
    return [share * known + (1 - share) * score for known, score in zip(is_positive, scores, strict=True)]


def _falling(scores: Seq[float], flags: Seq[float]) -> tuple[Floats, Floats]:
    values = numpy.asarray(scores, dtype=float)
    order = numpy.argsort(-values, kind="stable")
    return values[order], numpy.asarray(flags, dtype=float)[order]


def _cuts(values: Floats) -> numpy.ndarray:
    """Return how many of the falling values a threshold may keep: equal ones only together. None of them cannot be kept
    out where the first is 1, which no threshold exceeds."""
    inner = numpy.flatnonzero(numpy.diff(values)) + 1
    first = [0] if values[0] < 1.0 - 10.0**-DIGITS else []
    return numpy.concatenate([numpy.asarray(first, dtype=int), inner, [len(values)]])


def _between(values: Floats) -> Floats:
    """Return for each number of values that is kept the threshold in the middle: between the last of them and the
    next."""
    before, after = numpy.append(1.0, values), numpy.append(values, 0.0)
    middle: Floats = (before + after) / 2
    return middle
