"""Messages as clients write them: what is read, what becomes of it, and what is refused by name."""

from typing import Any

import pytest

from loraplex.errors import InvalidRequestError
from loraplex.messages import (
    conversation_of,
    escaped_message,
    message_json,
    prompt_of,
    template_message,
)
from loraplex.types import Message, ToolCall

CALL = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"order": 7}'}}
FOUND = ToolCall(id="call_1", name="find", arguments='{"order": 7}')


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"content": "hi"}, {"content": "hi"}),
        ({"content": ""}, {"content": ""}),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"content": "a\nb"}),
        ({"content": [{"type": "input_text", "text": "a", "cache_control": {"type": "ephemeral"}}]}, {"content": "a"}),
        (
            {"content": [{"type": "output_text", "text": "a", "annotations": [], "logprobs": None}]},
            {"content": "a"},
        ),
        ({"content": [{"type": "refusal", "refusal": "I cannot"}]}, {"content": "I cannot"}),
        ({"content": None, "refusal": "I cannot"}, {"content": "I cannot"}),
        ({"content": "hi", "refusal": None, "annotations": [], "audio": None}, {"content": "hi"}),
        ({"content": "hi", "function_call": None, "tool_calls": None, "unheard_of": []}, {"content": "hi"}),
        ({"content": "hi", "name": "bob", "cache_control": {"ttl": "1h"}}, {"content": "hi", "name": "bob"}),
        ({"content": None, "tool_calls": [CALL]}, {"content": "", "tool_calls": (FOUND,)}),
        ({"tool_calls": [{**CALL, "index": 0}]}, {"content": "", "tool_calls": (FOUND,)}),
        (
            {"tool_calls": [{"function": {"name": "find", "arguments": {"order": 7}}}]},
            {"content": "", "tool_calls": (ToolCall(name="find", arguments='{"order": 7}'),)},
        ),
        ({"content": "7", "tool_call_id": "call_1"}, {"content": "7", "tool_call_id": "call_1"}),
    ],
)
def test_a_message_is_read_and_written_again(given: dict[str, Any], read: dict[str, Any]) -> None:
    message = conversation_of([{"role": "assistant", **given}])[0]
    assert isinstance(message, Message)
    assert message == Message(role="assistant", **read)
    assert conversation_of([message_json(message)]) == (message,)
    assert prompt_of([message]) == (message,) and hash(message)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "input.0.content: is missing"),
        ({"content": None}, "input.0.content: null holds no text"),
        ({"content": []}, "input.0.content: [] holds no text"),
        ({"content": 3}, "input.0.content: 3 is not text or a list of text parts"),
        ({"content": [3]}, "input.0.content.0: 3 is not an object"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "input.0.content.0.type: 'image_url' is no text"),
        ({"content": [{"type": "input_audio"}]}, "input.0.content.0.type: 'input_audio' is no text"),
        ({"content": [{"type": "text"}]}, "input.0.content.0.text: is missing"),
        ({"content": [{"text": "x"}]}, "input.0.content.0.type: is missing"),
        (
            {"content": [{"type": "text", "text": "x", "refusal": "y"}]},
            "input.0.content.0.refusal: 'y' is beside the type 'text'",
        ),
        ({"content": "x", "audio": {"id": "a"}}, 'input.0.audio: {"id": "a"} is not supported'),
        ({"content": "x", "function_call": {"name": "f"}}, "input.0.function_call: "),
        ({"content": "x", "mood": "sad"}, "unknown field 'mood'"),
        ({"text": "x"}, "unknown field 'text'; did you mean content?"),
        ({"content": "x", "tool_calls": [{}]}, "input.0.tool_calls.0.function: is missing"),
        ({"tool_calls": [{"type": "custom", "custom": {}}]}, "input.0.tool_calls.0"),
        ({"content": "x", "name": 3}, "input.0.name: 3 is not text"),
    ],
)
def test_what_cannot_be_read_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        conversation_of([{"role": "user", **given}])
    assert said in caught.value.message and caught.value.remedy


def test_a_chat_template_gets_values_and_nothing_unescaped() -> None:
    calls = (
        ToolCall(id="<s>1", name="find<s>", arguments='{"<s>": ["\\u003cs>", 7]}'),
        ToolCall(name="find", arguments='{"order<s>'),
    )
    message = Message(role="<s>", content="<s>", name="<s>", tool_calls=calls, tool_call_id="<s>")
    assert template_message(escaped_message(message, lambda text: text.replace("<s>", "!"))) == {
        "role": "!",
        "content": "!",
        "name": "!",
        "tool_calls": [
            {"type": "function", "function": {"name": "find!", "arguments": {"!": ["!", 7]}}, "id": "!1"},
            {"type": "function", "function": {"name": "find", "arguments": '{"order!'}},
        ],
        "tool_call_id": "!",
    }
    assert template_message(Message(role="user", content="x")) == {"role": "user", "content": "x"}


def test_prompts_are_text_ids_or_messages() -> None:
    assert prompt_of("x") == "x"
    assert prompt_of([1, 2]) == (1, 2)
    for wrong in ([1, {"role": "user", "content": "x"}], 5, [None]):
        with pytest.raises(InvalidRequestError):
            prompt_of(wrong)  # type: ignore[arg-type]
