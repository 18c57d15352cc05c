"""What typed questions are about: text, messages, OpenAI's items, or any JSON."""

from typing import Any

import pytest

from loraplex.errors import InvalidRequestError
from loraplex.messages import MAX_ITEMS
from loraplex.state import items_of, state_of
from loraplex.types import Message

TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
READ = (Message(role="user", content="hello"), Message(role="assistant", content="hi"))


@pytest.mark.parametrize(
    ("state", "read"),
    [
        ('[{"role": "user", "content": "x"}]', '[{"role": "user", "content": "x"}]'),  # text is never parsed
        ({"b": [1, 2.5], "a": "é"}, '{"b":[1,2.5],"a":"é"}'),
        (["a", "b"], '["a","b"]'),
        (iter([READ[0], TURNS[1]]), READ),
        (TURNS, READ),
        ({"messages": TURNS}, READ),
        ({"messages": TURNS, "plan": "pro"}, None),
        ([*TURNS, "x"], None),
        ([{"role": "admin"}], '[{"role":"admin"}]'),
        ([], ""),
        ({}, ""),
    ],
)
def test_a_state_is_text_messages_or_json(state: Any, read: Any) -> None:
    found = state_of(state)
    assert found == read if read is not None else isinstance(found, str)


def test_items_become_messages() -> None:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}], "phase": "final_answer"},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "found"}]},
        {"role": "user", "content": [{"type": "input_json", "data": {"a": 1}}]},
        {"role": "user", "content": [{"type": "input_json", "data": TURNS}]},
    ]
    read = items_of(items)
    assert [(one.role, one.content) for one in read if isinstance(one, Message)] == [
        ("user", "a"),
        ("assistant", "b"),
        ("assistant", ""),
        ("tool", "found"),
        ("user", '{"a":1}'),
        ("user", "hello"),
        ("assistant", "hi"),
    ]


@pytest.mark.parametrize(
    ("items", "mentions"),
    [
        (["x"], "input.0: 'x' is not an item"),
        ([{"type": "reasoning"}], "input.0.type: 'reasoning' is no item"),
        ([{"role": "user"}], "input.0.content"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input.0.content.0.type"),
        (
            [{"type": "function_call_output", "call_id": "c", "output": "x"}],
            "input.0.call_id: 'c' is the id of no call",
        ),
        ([{"type": "function_call", "name": "x"}], "input.0.call_id: is missing"),
        (TURNS * MAX_ITEMS, "input: has 20000 items"),
    ],
)
def test_what_is_no_item_is_named(items: Any, mentions: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        items_of(items)
    assert mentions in caught.value.message


def test_what_json_cannot_write_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="too large"):
        state_of({"a": float("inf")})
    with pytest.raises(InvalidRequestError, match="no JSON"):
        state_of({"a": object()})
