"""Reads messages as clients write them, and writes them for a body or a chat template. HTTP routes, clients and
`Loraplex` read with the same code. Knows no contract."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError, model_validator

from loraplex.errors import InvalidRequestError, listed, quoted
from loraplex.problems import at, either, find_problem, refused, refused_at, wrong_at
from loraplex.types import Input, Message, ToolCall

MAX_ITEMS = 10_000  # in a list of a body
# type -> its field
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "input_json": "data"}
HINTS = ("cache_control", "prompt_cache_breakpoint")  # fields that change no answer, whatever they hold
UNREAD = ("annotations", "audio", "function_call", "logprobs")  # known fields that must be empty


def _document(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = False
    for name in HINTS:
        schema["properties"][name] = {"description": "accepted for compatibility; changes nothing"}


class _Fields(BaseModel):
    """Fields that are not known may hold only empty values, so that a client can send an answer back unchanged."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_document)

    @model_validator(mode="after")
    def _refuse_unknown(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in HINTS and value not in (None, [], {}, ""):
                if name in UNREAD:
                    raise wrong_at(name, value, "is not supported", "leave it out, or write it as text")
                raise at((name,), value, "extra_forbidden")
        return self


class PartBody(_Fields):
    """A part of a message's content. Only text can be read, and JSON, which becomes text."""

    type: str = Field(description=f"one of: {', '.join(TEXT_PARTS)}")
    text: str | None = None
    refusal: str | None = None
    data: Any = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_parts(cls, values: Any) -> Any:
        kind = values.get("type") if isinstance(values, Mapping) else None
        if isinstance(kind, str):
            if kind not in TEXT_PARTS:
                raise wrong_at("type", kind, "is no text", f"leave this part out; read are: {', '.join(TEXT_PARTS)}")
            if values.get(TEXT_PARTS[kind]) is None:
                raise at((TEXT_PARTS[kind],), None, "missing")
            for other in {*TEXT_PARTS.values()} - {TEXT_PARTS[kind]}:
                if values.get(other):
                    raise wrong_at(other, values[other], f"is beside the type {kind!r}", "leave it out")
        return values

    @property
    def content(self) -> str:
        return compact_json(self.data) if self.type == "input_json" else getattr(self, TEXT_PARTS[self.type]) or ""


class FunctionBody(_Fields):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCallBody(_Fields):
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = Field(None, description="accepted for compatibility; changes nothing")
    function: FunctionBody

    def to_call(self) -> ToolCall:
        given = self.function.arguments
        arguments = given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
        return ToolCall(id=self.id, name=self.function.name, arguments=arguments)


class MessageBody(_Fields):
    """A message as OpenAI's chat API has it. `annotations`, `audio` and `function_call` must be empty."""

    role: str = Field(description="`user`, `assistant`, or a role that the contract or the chat template knows")
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[PartBody], Tag("list"), Field(max_length=MAX_ITEMS, fail_fast=True)]
        | Annotated[None, Tag("null")],
        either("text or a list of text parts"),
    ] = Field(None, description="may be null or missing beside `tool_calls` or `refusal`")
    refusal: str | None = Field(None, description="what the assistant said instead of an answer; read as its text")
    name: str | None = Field(None, description="for the chat template; a contract writes the role's name")
    tool_calls: list[ToolCallBody] | None = Field(None, max_length=MAX_ITEMS)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content in (None, []) and not (self.tool_calls or self.refusal):
            if "content" not in self.model_fields_set:
                raise at(("content",), None, "missing")
            raise wrong_at("content", self.content, "holds no text", "give text or a list of text parts")
        return self

    def to_message(self) -> Message:
        """Return the message. Its text is the text of all parts, a line each."""
        parts = [self.content] if isinstance(self.content, str) else [part.content for part in self.content or ()]
        return Message(
            role=self.role,
            content="\n".join([*parts, self.refusal] if self.refusal else parts),
            name=self.name,
            tool_calls=tuple(call.to_call() for call in self.tool_calls or ()),
            tool_call_id=self.tool_call_id,
        )


def compact_json(value: Any) -> str:
    """Return a value as JSON without spaces. Raises InvalidRequestError for NaN, for an infinite number, which 1e999
    is, and for what is no JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except TypeError as exc:
        raise InvalidRequestError(f"no JSON: {exc}", remedy="give text, numbers, lists and objects") from None
    except ValueError:
        raise InvalidRequestError(
            "the JSON holds NaN, or a number that is too large",
            remedy="give numbers below 1e308, or write them as text",
        ) from None


def conversation_of(given: Input, field: str = "input") -> str | tuple[Message, ...]:
    """Return the conversation as requests hold it. field: its name in messages. Raises InvalidRequestError for anything
    but text or messages."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Iterable):
        raise InvalidRequestError(f"no conversation: {quoted(given)}", remedy="give text, or messages")
    return tuple(message_of(one, f"{field}.{index}") for index, one in enumerate(given))


def prompt_of(given: Input | Iterable[int]) -> str | tuple[int, ...] | tuple[Message, ...]:
    """Return a prompt as requests hold it: text, token ids or messages. Raises InvalidRequestError for all else."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        return conversation_of(given)
    items = tuple(given)
    ids = tuple(one for one in items if isinstance(one, int))
    return ids if len(ids) == len(items) else conversation_of(cast(Input, items))


def message_of(given: Message | Mapping[str, Any], where: str) -> Message:
    """Return a message as requests hold it. where: its place, for errors. Raises InvalidRequestError where it is no
    message."""
    if isinstance(given, Message):
        return given
    if not isinstance(given, Mapping):
        remedy = "give text, or messages with 'role' and 'content'"
        raise refused_at(where.split("."), f"{quoted(given)} is no message", remedy=remedy)
    try:
        return MessageBody.model_validate(given).to_message()
    except ValidationError as exc:
        raise refused(find_problem(exc.errors(), given, MessageBody, noun="field"), *where.split(".")) from None


def message_json(message: Message) -> dict[str, Any]:
    """Return the message as a body holds it, without fields that it lacks."""
    written: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        written["name"] = message.name
    if message.tool_calls:
        written["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            | ({} if call.id is None else {"id": call.id})
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        written["tool_call_id"] = message.tool_call_id
    return written


def template_message(message: Message) -> dict[str, Any]:
    """Return the message as chat templates take it: a tool call's arguments are values, not JSON text."""
    written = message_json(message)
    for call in written.get("tool_calls", ()):
        call["function"]["arguments"] = _value(call["function"]["arguments"])
    return written


def escaped_message(message: Message, escaped: Callable[[str], str]) -> Message:
    """Return the message with `escaped` applied to every text in it, also to those in the arguments of tool calls."""

    def maybe(text: str | None) -> str | None:
        return None if text is None else escaped(text)

    def arguments(text: str) -> str:
        value = _value(text)
        return escaped(text) if value is text else json.dumps(_escaped(value, escaped), ensure_ascii=False)

    return Message(
        role=escaped(message.role),
        content=escaped(message.content),
        name=maybe(message.name),
        tool_calls=tuple(
            ToolCall(id=maybe(call.id), name=escaped(call.name), arguments=arguments(call.arguments))
            for call in message.tool_calls
        ),
        tool_call_id=maybe(message.tool_call_id),
    )


def _value(arguments: str) -> Any:
    """Return the value of JSON text, and other text unchanged: a model may write anything."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _escaped(value: Any, escaped: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, list):
        return [_escaped(one, escaped) for one in value]
    if isinstance(value, dict):
        return {escaped(name): _escaped(one, escaped) for name, one in value.items()}
    return value


def tool_calls_left_out(messages: Iterable[Message]) -> str:
    """Return the warning for a text that holds what was said, but not the tools that were called; empty where no tool
    was called."""
    names = dict.fromkeys(call.name for message in messages for call in message.tool_calls)
    return f"left_out_tool_calls: the text has no place for calls of tools: {listed(list(names))}" if names else ""
