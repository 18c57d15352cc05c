"""Answers to typed questions: TypeSafe's formulas, and whose order counts."""

import pytest

from loraplex.decisions import Answer, answer_of, choice_confidence, score_confidence
from loraplex.types import Question, Verdict


def verdict(**scores: float) -> Verdict:
    return Verdict(classifier="x", label=max(scores, key=scores.__getitem__), scores=scores)


def asked(type: str, *labels: str, **scores: float) -> Answer:
    return answer_of(Question(type=type, instructions="", labels=labels), verdict(**scores))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("probabilities", "confidence"),
    [([0.85, 0.15, 0.0], 0.775), ([0.9, 0.06, 0.04], 0.85), ([0.5, 0.5], 0.0), ([1.0, 0.0], 1.0), ([1.0], 1.0)],
)
def test_a_choices_confidence_is_typesafes(probabilities: list[float], confidence: float) -> None:
    assert choice_confidence(probabilities) == pytest.approx(confidence)


@pytest.mark.parametrize(
    ("probabilities", "confidence"),
    [([0.0, 0.95, 0.05], 0.925), ([0.0, 0.0, 1.0], 1.0), ([1 / 3, 1 / 3, 1 / 3], 0.0), ([1.0], 1.0)],
)
def test_a_scores_confidence_is_typesafes(probabilities: list[float], confidence: float) -> None:
    assert score_confidence(probabilities) == pytest.approx(confidence)


def test_a_predicate_is_the_first_labels_probability() -> None:
    answer = asked("predicate", "yes", "no", solved=0.2, open=0.8)
    assert (answer.probability, answer.choice, answer.score, answer.confidence) == (0.2, None, None, None)


def test_a_predicate_that_names_the_contracts_labels_says_itself_which_one_holds() -> None:
    assert asked("predicate", "rude", "polite", polite=0.8, rude=0.2).probability == 0.2
    assert asked("predicate", "polite", "rude", polite=0.8, rude=0.2).probability == 0.8
    assert asked("predicate", "yes", "no", no=0.8, yes=0.2).probability == 0.8, "yes and no are the names by default"


def test_a_choice_answers_in_the_order_asked_and_with_the_likeliest() -> None:
    answer = asked("choice", "c", "a", "b", a=0.1, b=0.7, c=0.2)
    assert answer.choice == "b" and list(answer.probabilities or {}) == ["c", "a", "b"]


def test_a_scores_level_is_counted_in_the_order_asked() -> None:
    assert asked("score", "calm", "annoyed", "furious", calm=0.0, annoyed=0.95, furious=0.05).score == pytest.approx(
        1.05
    )
    assert asked("score", "furious", "annoyed", "calm", calm=0.0, annoyed=0.95, furious=0.05).score == pytest.approx(
        0.95
    )
