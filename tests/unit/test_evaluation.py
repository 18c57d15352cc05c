"""Figures of classifiers against scikit-learn's, and against hand-made cases."""

import numpy
import pytest
from sklearn.metrics import f1_score, log_loss, precision_score, recall_score, roc_auc_score

from loraplex.evaluation.figures import Figure, Figures, figures_of
from loraplex.evaluation.quality import auc, quality


def test_two_labels_are_scored_as_scikit_learn_does() -> None:
    draw = numpy.random.default_rng(0)
    truth = (draw.random(300) < 0.7).astype(int)  # 0: the positive label
    yes = numpy.clip(0.8 - 0.6 * truth + draw.normal(size=300) * 0.25, 0.01, 0.99).round(2)  # with ties
    said = (yes < 0.5).astype(int)
    found = figures_of(
        ["yes", "no"], truth.tolist(), numpy.stack([yes, 1 - yes], 1).tolist(), said.tolist(), [False] * 300
    )
    is_yes, says_yes = truth == 0, said == 0
    assert found.f1.value == pytest.approx(f1_score(is_yes, says_yes))
    assert found.precision.value == pytest.approx(precision_score(is_yes, says_yes))
    assert found.recall.value == pytest.approx(recall_score(is_yes, says_yes))
    assert found.auc.value == pytest.approx(roc_auc_score(is_yes, yes))
    assert found.accuracy.value == pytest.approx(float((truth == said).mean()))
    for one in (found.f1, found.auc, found.accuracy, found.precision, found.recall):
        assert one.low is not None and one.high is not None and one.value is not None
        assert one.low < one.value < one.high < one.low + 0.2
    assert sum(map(sum, found.confusion)) == 300 and found.confusion[0][0] == int((is_yes & says_yes).sum())


def drawn(draw: numpy.random.Generator, n: int, apart: float) -> Figures:
    """The figures of scores whose labels are `apart` standard deviations from each other."""
    truth = draw.integers(0, 2, n)
    logits = draw.normal(size=n) + apart * (truth == 0)
    yes = 1 / (1 + numpy.exp(apart / 2 - logits))
    scores = numpy.stack([yes, 1 - yes], 1).tolist()
    return figures_of(["yes", "no"], truth.tolist(), scores, (yes < 0.5).astype(int).tolist(), [False] * n)


@pytest.mark.parametrize(("n", "apart"), [(80, 1.5), (40, 3.0)])
def test_an_interval_holds_the_truth_about_as_often_as_it_says(n: int, apart: float) -> None:
    draw = numpy.random.default_rng(1)
    true = drawn(draw, 200_000, apart)
    samples = [drawn(draw, n, apart) for _ in range(200)]
    for name in ("accuracy", "precision", "recall", "f1", "auc"):
        value = getattr(true, name).value
        held = sum(one.low <= value <= one.high for one in (getattr(each, name) for each in samples))
        assert 180 <= held <= 200, f"{name}: {held} of 200"


def test_an_interval_of_a_perfect_sample_is_no_point() -> None:
    scores = [[0.9, 0.1]] * 10 + [[0.1, 0.9]] * 10
    found = figures_of(["yes", "no"], [0] * 10 + [1] * 10, scores, [0] * 10 + [1] * 10, [False] * 20)
    for one in (found.accuracy, found.precision, found.recall, found.f1, found.auc):
        assert one.value == pytest.approx(1.0) and one.low is not None and 0.6 < one.low < 0.95


def test_single_figures_are_those_with_intervals() -> None:
    draw = numpy.random.default_rng(2)
    for num_labels in (2, 4):
        scores = draw.dirichlet([1.0] * num_labels, 50)
        truth, said = draw.integers(0, num_labels, 50).tolist(), scores.argmax(1).tolist()
        names = [str(label) for label in range(num_labels)]
        found = figures_of(names, truth, scores.tolist(), said, [False] * 50)
        plain = quality(scores.tolist(), truth, said)
        assert plain.f1 == pytest.approx(found.f1.value) and plain.auc == pytest.approx(found.auc.value)
        assert plain.accuracy == found.accuracy.value and plain.log_loss == pytest.approx(found.log_loss)
        assert plain.log_loss == pytest.approx(log_loss(truth, scores))
        if num_labels > 2:
            assert plain.f1 == pytest.approx(f1_score(truth, said, average="macro"))
            assert plain.auc == pytest.approx(roc_auc_score(truth, scores, multi_class="ovr"))


def test_equal_scores_count_half() -> None:
    assert auc([0.5, 0.5, 0.5], [True, False, False]) == 0.5
    assert auc([0.5, 0.9], [True, True]) is None


def test_what_the_data_cannot_tell_is_none() -> None:
    nothing = figures_of(["yes", "no"], [], [], [], [], num_failed=3)
    assert (nothing.n, nothing.num_failed, nothing.f1, nothing.brier) == (0, 3, Figure(value=None), None)
    no_positive = figures_of(["yes", "no"], [1, 1], [[0.1, 0.9], [0.2, 0.8]], [1, 1], [False, False])
    assert (
        no_positive.f1.value is no_positive.auc.value is no_positive.recall.value is no_positive.precision.value is None
    )
    assert no_positive.accuracy.value == 1.0


def test_the_gate_calibration_and_distance_are_as_defined() -> None:
    scores = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.55, 0.45]]
    found = figures_of(["yes", "no"], [0, 1, 1, 1], scores, [0, 0, 1, 0], [False, False, False, True])
    assert found.coverage.value == 0.75
    assert found.wrong_above_gate.value == pytest.approx(1 / 3)
    assert found.brier == pytest.approx((2 * 0.01 + 2 * 0.36 + 2 * 0.04 + 2 * 0.3025) / 4)
    # bins 0.5-0.6: 0.55 wrong; 0.6-0.7: 0.6 wrong; 0.8-0.9: 0.8 right; 0.9-1: 0.9 right
    assert found.ece == pytest.approx((0.55 + 0.6 + 0.2 + 0.1) / 4)


def test_three_labels_are_averaged_over_those_that_occur() -> None:
    scores = numpy.eye(3)[[0, 1, 1]] * 0.7 + 0.1
    found = figures_of(["a", "b", "c"], [0, 1, 0], scores.tolist(), [0, 1, 1], [False] * 3)
    assert found.f1.value == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found.confusion == ((1, 1, 0), (0, 1, 0), (0, 0, 0))
