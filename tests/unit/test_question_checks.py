"""Typed questions against classifiers of which little is known, and how their errors are told."""

import asyncio
from typing import Any

import pytest

from loraplex.errors import AdapterError, InvalidRequestError
from loraplex.routing.question_checks import checked
from loraplex.routing.questions import Asked
from loraplex.server.typed import error_of
from loraplex.types import AdapterInfo, ErrorInfo, Question


class ScoreHead:
    """A service with one adapter: a score head, and no classifier.yaml."""

    def knows(self, name: str) -> bool:
        return True

    def adapter(self, name: str) -> AdapterInfo:
        return AdapterInfo(name=name, path="", version="v1", labels=("LABEL_0", "LABEL_1"))

    def contract(self, name: str) -> None:
        return None


def check(question: Question) -> None:
    service: Any = ScoreHead()
    asked = [Asked(place="questions.a.b", options="criteria", name="head", question=question)]
    asyncio.run(checked(service, asked, ["head"], {"head": ("head",)}, {}, None))


def test_a_score_head_without_a_contract_answers_a_choice_and_no_predicate() -> None:
    check(Question(type="choice", instructions="Which?", labels=("LABEL_1", "LABEL_0")))
    with pytest.raises(InvalidRequestError, match="which of its labels holds") as caught:
        check(Question(type="predicate", instructions="Is it?"))
    assert "classifier.yaml" in caught.value.remedy and caught.value.place == ("questions", "a.b", "type")


def test_the_error_of_a_question_names_it_and_the_adapter_that_failed() -> None:
    info = ErrorInfo(code=AdapterError.code, message="is broken", remedy="none")
    error = error_of(info, "isIt", "broken")
    assert isinstance(error, AdapterError) and error.adapter == "broken" and error.message == "'isIt': is broken"
