"""Says in plain sentences why a value was refused. No text of pydantic's own reaches a user."""

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Discriminator, Tag, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from loraplex.errors import MAX_QUOTED, InvalidRequestError, encodable, quoted, shortened

# pydantic's type of error -> what the value should have been
NOUNS = {
    "string_type": "text",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "decimal_type", "decimal_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), "an object"),
    "finite_number": "a finite number",
}
# pydantic's type of error -> what the value is, and what to do
SENTENCES = {
    "missing": ("is missing", "add it"),
    "greater_than": ("is not above {gt}", "give a number above {gt}"),
    "greater_than_equal": ("is below {ge}", "give {ge} or more"),
    "less_than": ("is not below {lt}", "give a number below {lt}"),
    "less_than_equal": ("is above {le}", "give {le} or less"),
    "int_parsing_size": ("has too many digits", "give a smaller number"),
    "too_short": ("has too few items", "give {min_length} or more"),
    "too_long": ("has too many items", "give {max_length} at most"),
    "string_too_short": ("is too short", "give text of {min_length} or more characters"),
    "string_too_long": ("is too long", "give text of at most {max_length} characters"),
    "string_unicode": ("is not valid Unicode", "send valid UTF-8, and no half of a surrogate pair"),
    "invalid_key": ("is a name that is not text", "give a name that is text"),
    "literal_error": ("is not {expected}", "give {expected}"),
    "wrong": ("{message}", "{remedy}"),
}
# Names that users write for one another, because other servers have them.
SYNONYMS = (
    ("input", "inputs", "input_text", "prompt", "text", "content", "conversation", "messages", "query"),
    ("classifiers", "classifier", "adapter_name", "adapter", "adapters", "model", "lora_name", "name", "names"),
    ("deadline_ms", "deadline", "timeout", "timeout_ms", "timeout_s"),
    ("source", "src", "lora_path", "path", "url", "uri"),
    ("pinned", "pin"),
    ("targets", "target", "weights"),
    ("shadows", "shadow"),
    ("labels", "classes", "label"),
    ("label", "truth", "answer", "expected"),
    ("verdict_id", "id"),
    ("conversation_id", "session_id", "session"),
    ("max_tokens", "max_new_tokens", "max_completion_tokens"),
)
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
KINDS: Mapping[type, str] = {str: "text", list: "list", dict: "object", type(None): "null"}  # tags of unions' members
YAML_KINDS = {bool: "boolean", int: "number", float: "number"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a value was refused.

    place:   the path of the value, with dots; empty where the values as a whole are wrong.
    given:   the value as it is shown; empty where `what` says all.
    what:    the rest of the sentence.
    remedy:  what to do.
    path:    the parts of the path, also where `what` names it.
    """

    place: str
    given: str
    what: str
    remedy: str
    path: tuple[str | int, ...] = ()

    @property
    def sentence(self) -> str:
        return f"{self.given} {self.what}".strip()


class NumbersAreNoBooleans(BaseModel):
    """Base of models with numbers: refuses a boolean in the place of a number, which pydantic would read as 0 or 1."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans(cls, values: Any) -> Any:
        for name in _numbers(cls) if isinstance(values, Mapping) else ():
            if (found := _boolean_in(values.get(name))) is not None:
                raise at((name, *found[0]), found[1], PydanticCustomError("either", "a number"))
        return values


def _boolean_in(value: Any) -> tuple[tuple[str | int, ...], bool] | None:
    """Return the first boolean in a number's place and its path, or None. Lists may be long, and hold lists."""
    if isinstance(value, bool):
        return (), value
    if isinstance(value, list):
        kinds = set(map(type, value))
        inner: Iterable[tuple[Any, Any]] = enumerate(value) if kinds & {bool, list} else ()
    else:
        inner = value.items() if isinstance(value, Mapping) else ()
    for key, one in inner:
        if (found := _boolean_in(one)) is not None:
            return (key, *found[0]), found[1]
    return None


@functools.cache
def _numbers(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the fields that take a number, or numbers by name."""
    kinds = {name: set(_kinds(field.annotation)) for name, field in model.model_fields.items()}
    return tuple(name for name, found in kinds.items() if found & {int, float} and bool not in found)


def _kinds(annotation: Any) -> Iterator[type]:
    parts = get_args(annotation)
    if get_origin(annotation) is dict:
        parts = parts[1:]
    elif get_origin(annotation) is Literal:
        return
    if not parts and isinstance(annotation, type):
        yield annotation
    for part in parts:
        yield from _kinds(part)


def kind_of(value: Any) -> str | None:
    """Return the tag of a union's member that takes `value`, or None."""
    return KINDS.get(type(value)) or next((kind for type_, kind in KINDS.items() if isinstance(value, type_)), None)


def wrong(message: str, remedy: str) -> PydanticCustomError:
    """Return an error for a validator to raise. A field's message goes on after the value: "is no size"."""
    return PydanticCustomError("wrong", "{message}", {"message": message, "remedy": remedy})


def wrong_at(field: str, value: object, what: str, remedy: str) -> ValidationError:
    """Return an error about one field for a model's validator to raise."""
    return at((field,), value, wrong(what, remedy))


def at(loc: tuple[str | int, ...], value: object, error: PydanticCustomError | str) -> ValidationError:
    """Return an error at a place below a model, for the model's validator to raise. error: also a type of pydantic's,
    such as "missing"."""
    return ValidationError.from_exception_data("body", [InitErrorDetails(type=error, loc=loc, input=value)])


def either(what: str, kind: Callable[[Any], str | None] = kind_of) -> Discriminator:
    """Return a discriminator that chooses a union's member by the value's type. A value of a wrong type gives one
    error, "is not {what}", instead of one for each member."""
    return Discriminator(kind, custom_error_type="either", custom_error_message=what)


def find_problem(errors: Sequence[Any], values: Any, model: Any, *, noun: str = "key", written: Any = None) -> Problem:
    """Return the first problem of the values that `model` refused.

    errors:   pydantic's `ValidationError.errors()`.
    noun:     "key" in a file, "field" in a request.
    written:  the values of a YAML file with every scalar as text, so that the message can show how to quote it.
    """
    error = errors[0]
    if error["type"] == "missing":  # a misspelt name is the likelier reason
        error = next((one for one in errors if one["type"] == "extra_forbidden"), error)
    path = _path(error, values)
    for one in errors:  # of a union's members, the one that got furthest says most
        other = _path(one, values)
        if len(other) > len(path) and other[: len(path)] == path:
            error, path = one, other
    place = ".".join(shortened(str(part)) for part in path)
    if error["type"] == "extra_forbidden":
        loc = error["loc"]
        models = _models_at(model, loc[:-1])
        known = dict.fromkeys(name for one in models for name in one.model_fields)
        what, remedy = unknown_field(place, path[-1], known, noun, _inside(models, path[-1]))
        if len(loc) > 2 and any(path[-1] in one.model_fields for one in _models_at(model, loc[:-2])):
            if _value_at(values, path[:-1], "type") == loc[-2]:
                what = f"{what}: a {loc[-2]} has none"  # one of another type has the field
        return Problem(place="", given="", what=what, remedy=remedy, path=path)
    value = error["input"]
    if written is not None and error["type"] == "string_type" and (kind := _yaml_kind(value)):
        return _unquoted(path, f"the YAML {kind} {quoted(value)}", written)
    nouns = _nouns(one for one in errors if _path(one, values) == path) if _noun(error) else ""
    if nouns:
        nouns = nouns.replace("an object", "keys and values") if noun == "key" else nouns
        return Problem(place=place, given=quoted(value), what=f"is not {nouns}", remedy=f"give {nouns}", path=path)
    context = {key: _number(part) for key, part in error.get("ctx", {}).items()}
    what, remedy = SENTENCES.get(error["type"], ("is not a value that this can have", "correct it"))
    given = quoted(value) if (place and error["type"] != "missing") or error["type"] == "string_unicode" else ""
    what, remedy = what.format_map(context), remedy.format_map(context)
    return Problem(place=place, given=given, what=what, remedy=remedy, path=path)


def refused(problem: Problem, *outside: str | int, remedy: str = "") -> InvalidRequestError:
    """Return the error of a request with this problem. outside: the path of the values that have it. remedy: in place
    of the problem's own."""
    path = (*outside, *problem.path)
    error = refused_at(path, problem.sentence, remedy=remedy or problem.remedy)
    if not problem.place:  # the sentence names the field itself
        error.message = refused_at(outside, problem.sentence, remedy="").message
    return error


def refused_at(place: Sequence[str | int], sentence: str, *, remedy: str) -> InvalidRequestError:
    """Return the error of one field, whose path stands before the sentence. Long parts of the path are cut."""
    shown = tuple(encodable(shortened(str(part))) for part in place)
    error = InvalidRequestError(": ".join(filter(None, (".".join(shown), sentence))), remedy=remedy)
    error.place = shown
    return error


def unknown_field(
    place: str, name: object, known: Iterable[str], noun: str = "field", inside: str = ""
) -> tuple[str, str]:
    """Return the message and the remedy for a name that is not `known`. inside: where else this name belongs."""
    known = list(known)
    synonyms = [group for group in SYNONYMS if name in group]
    near = [one for group in synonyms for one in group if one in known and one != name]
    near = near or [one for one in (inside,) if one] or difflib.get_close_matches(str(name)[:MAX_QUOTED], known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown {noun} {quoted(place)}{hint}", f"use: {', '.join(known)}" if known else "leave it out"


def similar(names: Iterable[str], known: Iterable[str]) -> str:
    """Return which of the known names the user may have meant, as a question; empty where none is like another."""
    near = {name: difflib.get_close_matches(name[:MAX_QUOTED], list(known), 1) for name in names}
    return "; ".join(f"did you mean {found[0]} for {name}?" for name, found in near.items() if found)


def _path(error: Any, value: Any) -> tuple[str | int, ...]:
    """Return the path in `value` of a pydantic error, without the union members that pydantic tried."""
    path: list[str | int] = []
    is_given = False
    for part in error["loc"]:
        is_index = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if is_given := is_index or (isinstance(value, Mapping) and part in value):
            path.append(part)
            value = value[part]
    return (*path, error["loc"][-1]) if error["type"] == "missing" and not is_given else tuple(path)


def _noun(error: Any) -> str:
    return str(error["msg"]) if error["type"] == "either" else NOUNS.get(error["type"], "")


def _nouns(errors: Iterable[Any]) -> str:
    *others, last = dict.fromkeys(noun for one in errors if (noun := _noun(one)))
    return f"{', '.join(others)} or {last}" if others else last


def _number(value: object) -> object:
    """Return the value of a limit as people write it: 1 for 1.0, and false for Python's False."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return {"False": "false", "True": "true"}.get(value, value) if isinstance(value, str) else value


def _yaml_kind(value: object) -> str:
    return YAML_KINDS.get(type(value), "date" if isinstance(value, date) else "")


def _unquoted(path: tuple[str | int, ...], what: str, written: Any) -> Problem:
    """Return the problem of a YAML scalar that is no text. `written` shows it as the file has it."""
    *parents, last = path
    around = written
    for part in parents:
        around = around[part]
    if isinstance(last, int):
        whole = ", ".join([*map(repr, around[: len(ORDINALS)]), "…"][: len(around)])
        given = f"the {ORDINALS[last]}" if last < len(ORDINALS) else f"number {last + 1}"
        remedy = f"quote it: [{whole}]"
    else:
        parents, given, remedy = list(path), "", f"quote it: {around[last]!r}"
    return Problem(place=".".join(map(str, parents)), given=given, what=f"is {what}, not text", remedy=remedy)


def _value_at(values: Any, path: Sequence[str | int], name: str) -> Any:
    for part in path:
        values = values[part]
    return values.get(name) if isinstance(values, Mapping) else None


def _models_at(model: Any, loc: Sequence[str | int]) -> list[type[BaseModel]]:
    """Return the model where `loc` leads, from `model` on. A union gives all its members."""
    if loc and (member := _tagged(model, loc[0])):
        model, loc = member, loc[1:]
    around = [model]
    models = list(_models(model))
    for part in loc:
        inner = [one.model_fields[part].annotation for one in models if part in one.model_fields]
        if inner:
            around = inner
        else:
            around = [member for one in around if (member := _tagged(one, part))] or around
        models = [found for one in around for found in _models(one)] or models
    return models


def _inside(models: Sequence[type[BaseModel]], name: object) -> str:
    """Return where a name belongs that is a field of one of the fields, such as `calibration: {temperature: …}`."""
    for outer, field in (pair for one in models for pair in one.model_fields.items()):
        if isinstance(field.annotation, type) and name in getattr(field.annotation, "model_fields", ()):
            return f"{outer}: {{{name}: …}}"
    return ""


def _tagged(annotation: Any, tag: object) -> Any:
    """Return the member of a union that has the tag, or None."""
    for part in get_args(annotation):
        if any(isinstance(one, Tag) and one.tag == tag for one in getattr(part, "__metadata__", ())):
            return part
        if member := _tagged(part, tag):
            return member
    return None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _models(part)
