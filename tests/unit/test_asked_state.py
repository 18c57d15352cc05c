"""What typed questions are about: text, messages, OpenAI's items, or any JSON."""

from typing import Any

import pytest

from loraplex.errors import InvalidRequestError
from loraplex.messages import MAX_ITEMS
from loraplex.state import placed_items, state_of
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
        ({"messages": "two"}, '{"messages":"two"}'),
        ([{"name": "x"}, 5], '[{"name":"x"},5]'),
        ([], ""),
        ({}, ""),
    ],
)
def test_a_state_is_text_messages_or_json(state: Any, read: Any) -> None:
    assert state_of(state) == read


@pytest.mark.parametrize(
    ("state", "place", "mentions"),
    [
        ([TURNS[0], {"role": "assistant", "contents": ""}], "state.1.content", "is missing"),
        ([*TURNS, "x"], "state.2", "'x'"),
        ([{"role": "admin"}], "state.0.content", "is missing"),
        ([{"content": "x"}], "state.0.role", "is missing"),
        ({"messages": TURNS, "customer_id": 5}, "state.customer_id", "beside messages"),
        ({"messages": [*TURNS, 5]}, "state.messages.2", "5"),
        ({"messages": []}, "state.messages", "no messages"),
    ],
)
def test_a_conversation_with_one_flaw_is_refused_and_not_read_as_json(state: Any, place: str, mentions: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        state_of(state)
    assert ".".join(caught.value.place) == place and mentions in caught.value.message, caught.value


def test_each_message_keeps_its_place_in_the_request() -> None:
    data = {"type": "input_json", "data": {"messages": TURNS}}
    found = placed_items([{"role": "user", "content": [data]}, TURNS[1]])
    inside = "input.0.content.0.data.messages"
    assert isinstance(found, tuple)
    assert [place for place, _ in found] == [f"{inside}.0", f"{inside}.1", "input.1"]
    with pytest.raises(InvalidRequestError) as caught:
        placed_items([{"role": "user", "content": [{**data, "data": None}]}])
    assert ".".join(caught.value.place) == "input.0.content.0.data"


def test_items_become_messages() -> None:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}], "phase": "final_answer"},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "found"}]},
        {"role": "user", "content": [{"type": "input_json", "data": {"a": 1}}]},
        {"role": "user", "content": [{"type": "input_json", "data": TURNS}]},
    ]
    read = placed_items(items)
    assert [(one.role, one.content) for _, one in read] == [
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
        placed_items(items)
    assert mentions in caught.value.message and mentions.startswith(".".join(caught.value.place))


def test_what_json_cannot_write_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="too large"):
        state_of({"a": float("inf")})
    with pytest.raises(InvalidRequestError, match="no JSON"):
        state_of({"a": object()})
