"""Reads what typed questions are about: text, messages, the items of OpenAI's decisions, or any JSON. Knows no
contract."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from loraplex.errors import InvalidRequestError, listed, quoted
from loraplex.messages import MAX_ITEMS, PartBody, compact_json, message_of
from loraplex.problems import find_problem, refused, refused_at
from loraplex.types import Message, ToolCall

State = str | tuple[Message, ...]
PlacedState = str | tuple[tuple[str, Message], ...]  # place in the request, for errors
CALLS, OUTPUTS = ("function_call", "custom_tool_call"), ("function_call_output", "custom_tool_call_output")
MESSAGE = "message"
MARKS = ("role", "content")  # an object with one of them is meant as a message
AS_TEXT = "or send what is no conversation as the text of its JSON"
UNREAD = ("type", "phase", "id", "status")  # fields of a message's item that change no answer


def state_of(value: Any, field: str = "state") -> State:
    """Return a state as requests hold it; see `placed_state`."""
    state = placed_state(value, field)
    return state if isinstance(state, str) else tuple(message for _, message in state)


def placed_state(value: Any, field: str = "state") -> PlacedState:
    """Return a state: its text, or its messages with the place of each. Text is taken verbatim. An array of messages,
    alone or as the only value of `{"messages": […]}`, is a conversation. Any other JSON is its compact text.

    field: the state's name in errors. Raises InvalidRequestError, which names the place, where one message of a
    conversation is none, where a conversation stands beside other values, and where there are too many messages."""
    if isinstance(value, str):
        return value
    if value in ({}, []):
        return ""
    value = [*value] if isinstance(value, Iterator) else value
    inner, where = value, field
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list | tuple):
        inner, where = value["messages"], f"{field}.messages"
        if others := [str(name) for name in value if name != "messages"]:
            raise _wrong(f"{field}.{others[0]}", "stands beside messages", f"leave it out; {AS_TEXT}")
        if not inner:
            raise _wrong(where, "holds no messages", "send at least one")
    elif not isinstance(value, Sequence) or not any(map(_is_like_a_message, value)):
        return compact_json(value)
    _check_number(inner, where)
    return tuple(_placed(one, f"{where}.{index}") for index, one in enumerate(inner))


def placed_items(items: Sequence[Any], field: str = "input") -> tuple[tuple[str, Message], ...]:
    """Return the items of OpenAI's decisions as messages, with the place of each. What a tool answered is a turn of the
    role `tool`, and must name an earlier call. Raises InvalidRequestError, which names the item."""
    _check_number(items, field)
    calls: set[str] = set()
    return tuple(placed for index, one in enumerate(items) for placed in _item(one, f"{field}.{index}", calls))


def _placed(value: Any, place: str) -> tuple[str, Message]:
    try:
        return place, message_of(value, place)
    except InvalidRequestError as exc:
        exc.remedy = f"{exc.remedy}; {AS_TEXT}"
        raise


class _Call(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: str
    call_id: str
    name: str
    arguments: str = ""
    input: str = ""
    id: str | None = None
    namespace: str | None = None
    status: str | None = None


class _Output(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: str
    call_id: str
    output: str | list[PartBody]
    id: str | None = None
    status: str | None = None


def _item(item: Any, place: str, calls: set[str]) -> Iterator[tuple[str, Message]]:
    if not isinstance(item, Mapping):
        raise _wrong(place, f"{quoted(item)} is not an item", "give an object with role and content")
    kind = item.get("type", MESSAGE)
    if kind in CALLS:
        call = _read(_Call, item, place)
        calls.add(call.call_id)
        made = ToolCall(id=call.call_id, name=call.name, arguments=call.arguments or call.input)
        yield place, Message(role="assistant", content="", tool_calls=(made,))
    elif kind in OUTPUTS:
        output = _read(_Output, item, place)
        if output.call_id not in calls:
            raise _wrong(
                f"{place}.call_id",
                f"{quoted(output.call_id)} is the id of no call before it",
                f"give the call_id of a call: {listed(sorted(calls)) or 'there is none'}",
            )
        parts = [output.output] if isinstance(output.output, str) else [one.content for one in output.output]
        yield place, Message(role="tool", content="\n".join(parts), tool_call_id=output.call_id)
    elif kind == MESSAGE:
        yield from _said(item, place)
    else:
        remedy = f"give one of: {', '.join((MESSAGE, *CALLS, *OUTPUTS))}"
        raise _wrong(f"{place}.type", f"{quoted(kind)} is no item that is read", remedy)


def _said(item: Mapping[str, Any], place: str) -> tuple[tuple[str, Message], ...]:
    """Return a message's item as a message. A user's only part may be the JSON of a whole conversation."""
    content = item.get("content")
    alone = content[0] if isinstance(content, list) and len(content) == 1 else None
    if isinstance(alone, Mapping) and alone.get("type") == "input_json" and item.get("role") == "user":
        found = placed_state(alone.get("data"), f"{place}.content.0.data")
        if not isinstance(found, str):
            return found
    return ((place, message_of({name: value for name, value in item.items() if name not in UNREAD}, place)),)


def _is_like_a_message(value: Any) -> bool:
    return isinstance(value, Message) or (isinstance(value, Mapping) and not value.keys().isdisjoint(MARKS))


def _check_number(items: Sequence[Any], field: str) -> None:
    if len(items) > MAX_ITEMS:
        raise _wrong(field, f"has {len(items)} items", f"give {MAX_ITEMS} at most")


def _wrong(place: str, sentence: str, remedy: str) -> InvalidRequestError:
    return refused_at(place.split("."), sentence, remedy=remedy)


def _read(model: Any, item: Mapping[str, Any], place: str) -> Any:
    try:
        return model.model_validate(item)
    except ValidationError as exc:
        raise refused(find_problem(exc.errors(), item, model, noun="field"), *place.split(".")) from None
