"""Checks what Python's callers give to `decide`. `Client` and `Loraplex` refuse the same, in the same words."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from loraplex.errors import InvalidRequestError, quoted
from loraplex.state import State, state_of
from loraplex.types import Question, QuestionType

MAX_QUESTIONS, MAX_LABELS = 400, 255  # of a request, and of a question
ASK_THE_BASE = "or start the server with --adhoc-questions, so that the bare base answers questions"


def given_state(value: Any) -> State:
    """Return a state as requests hold it. Raises InvalidRequestError for what is neither text, messages, an object nor
    a list: /v1/systemone takes no other JSON either."""
    if value is None or isinstance(value, bool | int | float):
        raise InvalidRequestError(
            f"state: {quoted(value)} is no text, object or list", remedy="give text, messages, or an object or a list"
        )
    return state_of(value)


def given_questions(questions: Any) -> dict[str, Question]:
    """Return typed questions by their names. Raises InvalidRequestError, which names the question that nobody could
    answer."""
    if not isinstance(questions, Mapping):
        raise InvalidRequestError(
            f"the questions are no mapping, but of the type {type(questions).__name__}",
            remedy='give them by their names: {"isPolite": Question(…)}',
        )
    if not questions:
        raise InvalidRequestError("no question is asked", remedy='give at least one: {"isPolite": Question(…)}')
    return {_name(name): _question(name, question) for name, question in questions.items()}


def check_deadline(deadline_ms: Any) -> None:
    """Raise InvalidRequestError for what is no number of milliseconds above 0. None is no deadline."""
    is_number = isinstance(deadline_ms, int | float) and not isinstance(deadline_ms, bool)
    if deadline_ms is not None and not (is_number and 0 < deadline_ms < math.inf):
        raise InvalidRequestError(
            f"deadline_ms: {quoted(deadline_ms)} is no time", remedy="give a number of milliseconds above 0, or None"
        )


def check_labels(where: str, question: Question, written: Callable[[str], str] = str.strip) -> None:
    """Raise InvalidRequestError where a question's labels are too few, too many or not distinct as they are written, or
    where one that it has not is described."""
    labels = question.labels
    least, most = (2, 2) if question.type == "predicate" else (2, MAX_LABELS)
    if not least <= len(labels) <= most:
        wanted = "two labels" if most == least else f"{least} to {most} labels"
        raise InvalidRequestError(f"{where} has {len(labels)} labels", remedy=f"give a {question.type} {wanted}")
    said = set(map(written, labels))
    if len(said) < len(labels) or "" in said:
        raise InvalidRequestError(
            f"{where} has labels that are empty or the same: {quoted(labels)}", remedy="name each label once"
        )
    if unknown := [one for one in question.descriptions if one not in labels]:
        raise InvalidRequestError(
            f"{where} describes {quoted(unknown[0])}, which is none of its labels {quoted(labels)}",
            remedy="use a label's text",
        )


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise InvalidRequestError(f"the question's name {quoted(name)} is no text", remedy="give a text as its name")
    return name


def _question(name: str, question: Any) -> Question:
    where = f"the question {quoted(name)}"
    if not isinstance(question, Question):
        raise InvalidRequestError(
            f"{where} is no Question, but of the type {type(question).__name__}",
            remedy="give a loraplex.Question(type=…, instructions=…)",
        )
    if question.type not in (types := get_args(QuestionType)):
        raise InvalidRequestError(
            f"{where}: type: {quoted(question.type)} is no type of question", remedy=f"give one of: {', '.join(types)}"
        )
    if not isinstance(question.instructions, str):
        raise InvalidRequestError(f"{where}: instructions: are no text", remedy="say in words what is asked")
    labels, described = question.labels, question.descriptions
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not all(isinstance(one, str) for one in labels):
        raise InvalidRequestError(
            f"{where}: labels: {quoted(labels)} are no texts",
            remedy="give a tuple of texts; what the contract calls true and false are 'true' and 'false'",
        )
    if not isinstance(described, Mapping) or not all(isinstance(one, str) for one in described.values()):
        raise InvalidRequestError(
            f"{where}: descriptions: {quoted(described)} are no texts by label", remedy="give label -> text"
        )
    made: Question = replace(question, labels=tuple(labels))
    check_labels(where, made)
    return made
