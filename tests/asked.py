"""A tiny base that chats, and questions for it that no adapter was trained for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig, PreTrainedConfig

import tiny
from loraplex.decisions import Decisions
from loraplex.errors import InvalidRequestError
from loraplex.types import Question

CHATML = "{% for m in messages %}<|ask|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{{ '<|ask|>assistant\n' }}"
QUESTIONS = {
    "isDone": Question(type="predicate", instructions="Is the payment done?"),
    "topic": Question(
        type="choice",
        instructions="What is it about?",
        labels=("table", "payment", "other"),
        descriptions={"table": "a table for two"},
    ),
    "hurry": Question(type="score", instructions="How urgent is it?", labels=("calm", "soon", "now")),
    "alike": Question(
        type="choice", instructions="When?", labels=("done before the end of today", "done before the end of the week")
    ),
    "untold": Question(type="choice", instructions="", labels=("hello", "thanks")),
}


def config(max_model_len: int = 1024) -> PreTrainedConfig:
    """With room for questions."""
    values: dict[str, Any] = tiny.FAMILIES["mistral"].to_dict() | {"max_position_embeddings": max_model_len}
    return tiny.fitted(MistralConfig(**values))


def save_chat_bundle(folder: Path, *, is_activated: bool = True, max_model_len: int = 1024) -> Path:
    """A base that chats, and three adapters whose prompts the chat template writes."""
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    tiny.save_base(folder, config(max_model_len), tokenizer)
    invocation = [tiny.SPECIAL_TOKENS.index("<|ask|>")] if is_activated else None
    for index in range(3):
        tiny.save_adapter(
            folder,
            folder / f"task{index}",
            contract={"labels": ["yes", "no"]},
            seed=index + 1,
            r=2 + index,
            alora_invocation_tokens=invocation,
        )
    return folder


# What no way in may take, and what the error says about it.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a choice without labels": ({"questions": {"q": Question(type="choice", instructions="x")}}, "'q' has 0 labels"),
    "a predicate of three": (
        {"questions": {"q": Question(type="predicate", instructions="x", labels=("a", "b", "c"))}},
        "'q' has 3 labels",
    ),
    "a label twice": ({"questions": {"q": Question(type="choice", instructions="x", labels=("a", "a"))}}, "the same"),
    "labels that are no text": (
        {"questions": {"q": Question(type="choice", instructions="x", labels=(True, False))}},  # type: ignore[arg-type]
        "'true' and 'false'",
    ),
    "one text as labels": (
        {"questions": {"q": Question(type="choice", instructions="x", labels="ab")}},  # type: ignore[arg-type]
        "'q': labels",
    ),
    "a label that nobody has": (
        {"questions": {"q": Question(type="predicate", instructions="x", descriptions={"maybe": "y"})}},
        "describes 'maybe'",
    ),
    "a type of another format": (
        {"questions": {"q": Question(type="noul", instructions="x")}},  # type: ignore[arg-type]
        "predicate",
    ),
    "a mapping": ({"questions": {"q": {"type": "predicate", "instructions": "x"}}}, "loraplex.Question"),
    "a list": ({"questions": [Question(type="predicate", instructions="x")]}, "by their names"),
    "no questions": ({"questions": {}}, "no question"),
    "a name that is no text": ({"questions": {5: Question(type="predicate", instructions="x")}}, "5"),
    "instructions that are no text": (
        {"questions": {"q": Question(type="predicate", instructions=None)}},  # type: ignore[arg-type]
        "instructions",
    ),
    "a deadline that is no number": ({"deadline_ms": "x"}, "deadline_ms"),
    "a deadline in the past": ({"deadline_ms": 0}, "deadline_ms"),
    "no state": ({"state": None}, "state: null"),
    "a number": ({"state": 5}, "state: 5"),
    "no number": ({"state": {"a": float("nan")}}, "NaN"),
    "a lone surrogate": ({"state": "\ud800"}, "Unicode"),
    "nothing": ({"state": " "}, "empty"),
}


def assert_refused(asked: Any, wrong: Mapping[str, Any], told: str, name: str = "task0") -> None:
    """Check that `decide` refuses what is wrong before any work. asked: a client, or a `Loraplex`."""
    given = {"state": "hello", "questions": {name: Question(type="predicate", instructions="x")}, **wrong}
    with pytest.raises(InvalidRequestError) as caught:
        asked.decide(given.pop("state"), given.pop("questions"), **given)
    assert told in str(caught.value)


def assert_same(found: Decisions, expected: Decisions, tolerance: float = 1e-4) -> None:
    """Check that all fields of all answers are equal, and their order too; verdicts' ids aside."""
    assert [*found.answers] == [*expected.answers]
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    for name, answer in expected.answers.items():
        for field in dataclasses.fields(answer):
            one, other = getattr(found[name], field.name), getattr(answer, field.name)
            if isinstance(other, Mapping):
                assert [*one] == [*other], (name, field.name)
                one, other = [*one.values()], [*other.values()]
            if field.name == "verdict_id":
                one, other = one is None, other is None
            elif field.name == "error":
                one, other = one and one.code, other and other.code
            elif isinstance(other, float | list):
                other = pytest.approx(other, abs=tolerance)
            assert one == other, (name, field.name)
