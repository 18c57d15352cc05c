"""The errors of /v1/decisions and /v1/systemone, in the shapes that their clients read."""

import json
from typing import Any, Literal

from loraplex.errors import LoraplexError

DECISIONS, SYSTEMONE = "/v1/decisions", "/v1/systemone"
TYPED = frozenset({DECISIONS, SYSTEMONE})
INVOCATIONS = "/invocations"
NATIVE = ("input", "inputs", "classifiers")  # fields of Loraplex's own body, which may hold questions too
TYPESAFE_ID = "X-TypeSafe-Request-Id"
# status -> OpenAI's and TypeSafe's name of what went wrong; any other below 500 is a wrong request
TYPES = {
    401: "authentication_error",
    403: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


def typed_kind(body: Any) -> Literal["decisions", "systemone"] | None:
    """Return whose typed questions a body asks, where it asks any."""
    given = body if isinstance(body, dict) else {}
    questions = given.get("questions")
    if "state" in given and "questions" in given:
        return "systemone"
    if isinstance(questions, list):
        return "decisions"
    return "systemone" if isinstance(questions, dict) and given.keys().isdisjoint(NATIVE) else None


def wire_of(path: str, body: bytes) -> str:
    """Return the path in whose shape an error is answered. /invocations takes the bodies of several paths."""
    if path != INVOCATIONS or b'"questions"' not in body:
        return path
    try:
        kind = typed_kind(json.loads(body))
    except (ValueError, RecursionError):
        return path
    return path if kind is None else {"decisions": DECISIONS, "systemone": SYSTEMONE}[kind]


def in_wire_shape(path: str, content: dict[str, Any], failure: LoraplexError) -> dict[str, Any]:
    """Return an error as the path's clients read it. OpenAI's error has a type and the field at fault; TypeSafe's is
    `detail`, which stands beside ours."""
    status = failure.status
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {**content["error"], "type": kind, "param": ".".join(failure.place) or None}
    if path == DECISIONS:
        return {"error": error}
    message = error["message"]
    if status in (400, 422):
        place = ["body", *failure.place]
        return {"error": error, "detail": [{"loc": place, "msg": message, "type": error["code"]}]}
    return {"error": error, "detail": {"error_type": kind, "message": message}}
