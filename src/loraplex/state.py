"""Reads what typed questions are about: text, messages, the items of OpenAI's decisions, or any JSON. Knows no
contract."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from loraplex.errors import InvalidRequestError, listed, quoted
from loraplex.messages import MAX_ITEMS, PartBody, compact_json, message_of
from loraplex.problems import find_problem
from loraplex.types import Message, ToolCall

State = str | tuple[Message, ...]
CALLS, OUTPUTS = ("function_call", "custom_tool_call"), ("function_call_output", "custom_tool_call_output")
MESSAGE = "message"
SAYING = ("content", "tool_calls")  # one of them makes an object with a role a message
UNREAD = ("type", "phase", "id", "status")  # fields of a message's item that change no answer


def state_of(value: Any, field: str = "state") -> State:
    """Return a state as requests hold it. Text is taken verbatim. An array of messages, alone or as the only value of
    `{"messages": […]}`, is a conversation. Any other JSON is its compact text.

    field: the state's name in errors. Raises InvalidRequestError where a message is none, or there are too many."""
    if isinstance(value, str):
        return value
    if value in ({}, []):
        return ""
    value = [*value] if isinstance(value, Iterator) else value
    inner = value["messages"] if isinstance(value, Mapping) and value.keys() == {"messages"} else value
    if not (isinstance(inner, Sequence) and inner and all(map(_is_message, inner))):
        return compact_json(value)
    _check_number(inner, field)
    where = field if inner is value else f"{field}.messages"
    return tuple(message_of(one, f"{where}.{index}") for index, one in enumerate(inner))


def items_of(items: Sequence[Any], field: str = "input") -> State:
    """Return the items of OpenAI's decisions as messages. What a tool answered is a turn of the role `tool`, and must
    name an earlier call. Raises InvalidRequestError, which names the item."""
    _check_number(items, field)
    calls: set[str] = set()
    return tuple(message for index, one in enumerate(items) for message in _item(one, f"{field}.{index}", calls))


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


def _item(item: Any, place: str, calls: set[str]) -> Iterator[Message]:
    if not isinstance(item, Mapping):
        raise InvalidRequestError(
            f"{place}: {quoted(item)} is not an item", remedy="give an object with role and content"
        )
    kind = item.get("type", MESSAGE)
    if kind in CALLS:
        call = _read(_Call, item, place)
        calls.add(call.call_id)
        made = ToolCall(id=call.call_id, name=call.name, arguments=call.arguments or call.input)
        yield Message(role="assistant", content="", tool_calls=(made,))
    elif kind in OUTPUTS:
        output = _read(_Output, item, place)
        if output.call_id not in calls:
            raise InvalidRequestError(
                f"{place}.call_id: {quoted(output.call_id)} is the id of no call before it",
                remedy=f"give the call_id of a call: {listed(sorted(calls)) or 'there is none'}",
            )
        parts = [output.output] if isinstance(output.output, str) else [one.content for one in output.output]
        yield Message(role="tool", content="\n".join(parts), tool_call_id=output.call_id)
    elif kind == MESSAGE:
        yield from _said(item, place)
    else:
        raise InvalidRequestError(
            f"{place}.type: {quoted(kind)} is no item that is read",
            remedy=f"give one of: {', '.join((MESSAGE, *CALLS, *OUTPUTS))}",
        )


def _said(item: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """Return a message's item as a message. A user's only part may be the JSON of a whole conversation."""
    content = item.get("content")
    alone = content[0] if isinstance(content, list) and len(content) == 1 else None
    if isinstance(alone, Mapping) and alone.get("type") == "input_json" and item.get("role") == "user":
        found = state_of(alone.get("data"), f"{place}.content.0.data")
        if not isinstance(found, str):
            return found
    return (message_of({name: value for name, value in item.items() if name not in UNREAD}, place),)


def _is_message(value: Any) -> bool:
    if isinstance(value, Message):
        return True
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and not value.keys().isdisjoint(SAYING)


def _check_number(items: Sequence[Any], field: str) -> None:
    if len(items) > MAX_ITEMS:
        raise InvalidRequestError(f"{field}: has {len(items)} items", remedy=f"give {MAX_ITEMS} at most")


def _read(model: Any, item: Mapping[str, Any], place: str) -> Any:
    try:
        return model.model_validate(item)
    except ValidationError as exc:
        problem = find_problem(exc.errors(), item, model, noun="field")
        raise InvalidRequestError(
            f"{place}{problem.place and '.'}{problem.place}: {problem.sentence}", remedy=problem.remedy
        ) from None
