"""Reads a request's body as JSON, without duplicate keys. Says where a body is not JSON, and what to change."""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders

from loraplex.errors import BadInputError, InvalidRequestError, quoted

OBJECT = "send one JSON object in UTF-8"
MAX_DEPTH = 100  # lists and objects inside each other; Python's own limit would be met later, anywhere
MOST_FOUND = 20  # characters of the body in a message
PROBLEMS = {
    "Expecting value": "a value is expected",
    "Expecting property name enclosed in double quotes": "a key in double quotes is expected",
    "Expecting ',' delimiter": "a comma or a closing bracket is expected",
    "Expecting ':' delimiter": "a colon is expected",
    "Extra data": "nothing more is expected",
    "Unterminated string starting at": "a text has no closing quote",
    "Invalid control character at": "a control character in a text is not escaped",
    "Invalid \\escape": "this is no escape of JSON",
    "Invalid \\uXXXX escape": "four hexadecimal digits are expected",
    "Unexpected UTF-8 BOM (decode using utf-8-sig)": "a value is expected",
    "Illegal trailing comma before end of object": "a comma has nothing behind it",
    "Illegal trailing comma before end of array": "a comma has nothing behind it",
}
FORM = re.compile(r"[\w.%+~-]+=[^\s\"{}]*(&|$)")
WORD = re.compile(r"[A-Za-z_]\w*")
CONSTANT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|(-?(?:NaN|Infinity))', re.DOTALL)


class JsonRoute(APIRoute):
    """A route that reads its body with `parse`. Checks before that there is no query, and the Content-Type."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_json(request: Request) -> Response:
            check_query(request)
            _check_type(request)
            scope = {**request.scope, "headers": list(request.scope["headers"])}
            MutableHeaders(scope=scope)["Content-Type"] = "application/json"
            request = _JsonRequest(scope, request.receive)
            await request.json()  # here, because FastAPI would hide our errors
            return await handle(request)

        return handle_json


class _JsonRequest(Request):
    _parsed: Any = ...

    async def json(self) -> Any:
        if self._parsed is ...:
            self._parsed = parse(await self.body())
        return self._parsed


def check_query(request: Request) -> None:
    if request.query_params:
        name = next(iter(request.query_params))
        raise InvalidRequestError(
            f"the query parameter {quoted(name)} is unknown: {request.url.path} takes none",
            remedy="give it as a field of the body",
        )


def media_type(header: str) -> str:
    """Return the type that a Content-Type or an Accept begins with, without parameters and in lower case."""
    return header.partition(";")[0].strip().lower()


def _check_type(request: Request) -> None:
    given = request.headers.get("Content-Type")
    if given is None and "Origin" in request.headers:
        # A web page of any origin can send this without asking first.
        raise InvalidRequestError("a browser sent no Content-Type", remedy="send Content-Type: application/json")
    kind = "application/json" if given is None else media_type(given)
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise InvalidRequestError(
            f"Content-Type is {given!r}; send application/json", remedy="send JSON with Content-Type: application/json"
        )


def decoded(body: bytes) -> str:
    """Return the body as text. Raises BadInputError where it is none."""
    encoding = json.detect_encoding(body)
    try:
        text = body.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as exc:
        raise BadInputError(
            f"the body is not text in {encoding.removesuffix('-sig').upper()}: "
            f"byte {exc.start + len(body) - len(exc.object)} is 0x{exc.object[exc.start]:02x}",
            remedy=OBJECT,
        ) from None
    return text


def parse(body: bytes) -> Any:
    """Return the value of a JSON text. Raises BadInputError where it is none, and InvalidRequestError where an object
    has a key twice."""
    text = decoded(body)
    if not text.strip():
        raise BadInputError("the body is empty", remedy=OBJECT)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as exc:
        raise _not_json(text, exc.pos, PROBLEMS.get(exc.msg, exc.msg)) from None
    except _Constant:
        at = next(match.start() for match in CONSTANT.finditer(text) if match[1])
        raise _not_json(text, at, "JSON has no NaN and no Infinity") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # Python reads no number of more than 4300 digits
        raise BadInputError("the body holds a number of more than 4300 digits", remedy="send shorter numbers") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = (child for one in level for child in (one.values() if isinstance(one, dict) else one))
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> BadInputError:
    return BadInputError(
        "the body is nested too deeply", remedy=f"nest lists and objects {MAX_DEPTH} levels deep at most"
    )


class _Constant(Exception):
    """The text holds NaN or Infinity."""


def _refuse_constant(name: str) -> NoReturn:
    raise _Constant


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequestError(f"the key {quoted(twice)} is given twice", remedy="give each key of an object once")
    return made


def _not_json(text: str, at: int, problem: str) -> BadInputError:
    found = text[at : at + MOST_FOUND]
    stands = f"found {found + ('…' if at + MOST_FOUND < len(text) else '')!r}" if found.strip() else "the body ends"
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return BadInputError(
        f"the body is not JSON: line {line}, column {column}: {problem}, {stands}", remedy=_hint(text, at)
    )


def _hint(text: str, at: int) -> str:
    """Return what to change, by the causes that are common."""
    before, rest = text[:at].rstrip(), text[at:]
    word = WORD.match(rest)
    if FORM.match(text):
        return 'this looks like a form: send JSON instead, such as {"input": "…"}'
    if not rest.strip():
        return "send the whole body: it ends too early"
    if rest[0] == "'":
        return "put keys and texts in double quotes, not in single ones"
    if (rest[0] in "}]" and before.endswith(",")) or rest[0] == ",":
        return "remove the comma that has nothing behind it"
    if rest[0] == '"':
        return "check that each text has a closing quote, and that a comma or a colon stands before the next"
    if rest[0] == "\ufeff":
        return "send the body without a byte order mark"
    if rest[0] in "/#":
        return "remove comments: JSON has none"
    if rest[0] in "\n\r\t":
        return "write line breaks in a text as \\n, and tabs as \\t"
    if CONSTANT.match(rest):
        return "send null or a finite number"
    if word and word[0] in ("True", "False", "None"):
        return "write true, false and null in lower case"
    if word and before.endswith(("{", ",")):
        return "put keys in double quotes"
    return OBJECT
