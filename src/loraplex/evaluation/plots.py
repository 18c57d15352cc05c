"""The plots of one classifier: how far its scores can be trusted, and how well they tell the labels apart."""

import numpy

from loraplex.evaluation.figures import bins_of
from loraplex.evaluation.judged import Judged
from loraplex.evaluation.quality import Booleans, Floats, positives
from loraplex.measuring.svg import COLOURS, FAINT, INK, figure, svg

HEIGHT = 2.5  # inches
STEPS = 20  # bars of the scores
MOST_POINTS = 200  # of a ROC curve
LEAST_AREA, MORE_AREA = 6.0, 60.0  # of a point that stands for no conversation, and for all of them on top


def plots(name: str, one: Judged) -> str:
    """Return the reliability, the ROC curve and the scores. With two labels they are of the positive one's score; with
    more, the first and the last are of the answered label's score, and there is a ROC curve for each label.

    No label is written into the plots: fonts lack characters, and some texts are formulas to matplotlib."""
    scores, truth = numpy.asarray(one.scores, dtype=float), numpy.asarray(one.truth)
    if len(one.labels) == 2:
        shown, is_right = scores[:, 0], truth == 0
    else:
        said = numpy.asarray(one.answered)
        shown, is_right = scores[numpy.arange(len(said)), said], said == truth
    drawn, [left, middle, right] = figure(HEIGHT, columns=3)
    bins = bins_of(shown, is_right)
    for axes in (left, middle):
        axes.plot([0, 1], [0, 1], "--", color=FAINT, linewidth=0.8)
    at, shares = [mean for mean, _, _ in bins], [share for _, share, _ in bins]
    left.plot(at, shares, linewidth=0.8, color=COLOURS[0])
    left.scatter(at, shares, s=[LEAST_AREA + MORE_AREA * num / len(shown) for _, _, num in bins], color=COLOURS[0])
    left.set(xlabel="score", ylabel="share that is right")
    for label, colour in zip(positives(len(one.labels)), COLOURS, strict=False):
        middle.plot(*roc(scores[:, label], truth == label), linewidth=1.4, color=colour)
    middle.set(xlabel="false alarms", ylabel="found")
    edges = numpy.linspace(0, 1, STEPS + 1)
    for of, colour, start in ((is_right, COLOURS[0], 0.0), (~is_right, COLOURS[1], 0.5)):
        num, _ = numpy.histogram(shown[of], edges)
        right.bar(edges[:-1] + (start + 0.25) / STEPS, num, width=0.5 / STEPS, color=colour)
    right.set(xlabel="score", ylabel="conversations")
    right.set_yscale("log")  # most scores are near 0 or 1, and the others matter
    right.set_ylim(bottom=0.7)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    right.yaxis.set_minor_formatter(lambda value, _: "")
    for axes in (left, middle, right):
        axes.set_xlim(-0.02, 1.02)
        axes.grid(True, color=FAINT, linewidth=0.5)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(color=INK, fontsize=9)
    for axes in (left, middle):
        axes.set_ylim(-0.02, 1.02)
    return svg(drawn, f"{name}: reliability, ROC curve, scores")


def roc(scores: Floats, is_right: Booleans) -> tuple[Floats, Floats]:
    """Return the shares of the conversations without the label, and of those with it, that score at least as high as
    each of a falling row of thresholds: the curve's points from (0, 0) to (1, 1). Nothing where one kind is missing."""
    num, other = int(is_right.sum()), int((~is_right).sum())
    if not num or not other:
        return numpy.zeros(0), numpy.zeros(0)
    order = numpy.argsort(-scores, kind="stable")
    ends = numpy.append(numpy.flatnonzero(numpy.diff(scores[order])), len(scores) - 1)  # of runs of equal scores
    found = numpy.cumsum(is_right[order])[ends] / num
    alarms = numpy.cumsum(~is_right[order])[ends] / other
    points = numpy.unique(numpy.linspace(0, len(ends) - 1, min(len(ends), MOST_POINTS)).astype(int))
    return numpy.append(0.0, alarms[points]), numpy.append(0.0, found[points])
