"""Holds what /v1/decisions and /v1/systemone share: how questions are asked, and what we add to their answers."""

import json
import time
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NotRequired

from fastapi import Request, Response
from pydantic import ConfigDict, Field, Tag
from typing_extensions import TypedDict

from loraplex.config import ServerConfig
from loraplex.decisions import Answer
from loraplex.errors import InvalidRequestError, LoraplexError, encodable, quoted, shortened
from loraplex.messages import compact_json
from loraplex.problems import either, unknown_field
from loraplex.routing.passes import raised
from loraplex.routing.questions import EVERYTHING, Asked, plan
from loraplex.server import logs
from loraplex.server.answers import visible
from loraplex.server.routes import answered, before_the_work, remaining_ms, router_of, service_of
from loraplex.server.schemas import Body, RoleNames
from loraplex.server.typed_errors import TYPESAFE_ID
from loraplex.state import PlacedState
from loraplex.types import ClassifyResult, ErrorInfo, Usage

# Known fields of clients, which change no answer.
NEUTRAL = ("prompt_cache_key", "prompt_cache_options", "safety_identifier", "temperature", "user", "metadata")
EXTENSION = "x_"

Words = Annotated[
    Annotated[str, Tag("text")] | Annotated[dict[str, Any], Tag("object")] | Annotated[list[Any], Tag("list")],
    either("text, an object or a list"),
]


def _document(schema: dict[str, Any]) -> None:
    for name in NEUTRAL:
        schema["properties"][name] = {"description": "accepted for compatibility; changes nothing"}


class TypedBody(Body):
    """Fields that both routes take beside their own."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_document)

    conversation_id: str | None = Field(
        None,
        description="the same id for every turn of a conversation: the next turn reuses cached work, and a route keeps "
        "its target",
    )
    deadline_ms: float | None = Field(None, gt=0, strict=True, description="milliseconds from the request")
    roles: RoleNames | None = None
    cascade: bool = Field(
        True, strict=True, description="false runs every classifier, whatever its gate says (`when` in loraplex.yaml)"
    )
    stream: Literal[False] | None = None

    def check_fields(self) -> None:
        """Raise InvalidRequestError for a field that would have to be ignored."""
        for name in self.model_extra or ():
            if name not in NEUTRAL and not name.startswith(EXTENSION):
                message, remedy = unknown_field(name, name, type(self).model_fields)
                error = InvalidRequestError(message, remedy=f"{remedy}; see /docs for the fields")
                error.place = (shortened(name),)
                raise error


@dataclass(frozen=True, slots=True, kw_only=True)
class Typed:
    """The answers to a request's questions, in order.

    model:  the name of who answered, for the client.
    names:  of the classifier or route that answered, or of the question.
    """

    model: str
    names: Seq[str]
    answers: Seq[Answer]
    masses: Seq[float | None]
    usage: Usage


async def decide(
    request: Request,
    body: TypedBody,
    asked: Seq[Asked],
    state: PlacedState,
    *,
    field: str,
    model: str | None,
    patience_s: float | None = None,
) -> Typed:
    """Answer typed questions through the same service as /v1/classify.

    field:       the state's name in the body.
    model:       None leaves the choice of a classifier to the questions' names.
    patience_s:  how long to wait for adapters that were never loaded, before NotReadyError is raised."""
    started = time.monotonic()
    body.check_fields()
    router, config = router_of(request), _config(request)
    model = EVERYTHING if model is None else model
    planning = plan(
        router,
        asked,
        state if isinstance(state, str) else tuple(message for _, message in state),
        field=field,
        model=model,
        aliases=config.decisions_alias,
        roles=body.roles,
        strict=config.decisions_instructions == "strict",
        places=() if isinstance(state, str) else [place for place, _ in state],
        patience_s=patience_s,
    )
    made = await before_the_work(request, planning, body.deadline_ms)
    left_ms = remaining_ms(body.deadline_ms, started)
    asked_now = replace(made.request, deadline_ms=left_ms, conversation_id=body.conversation_id, cascade=body.cascade)
    result = await answered(request, asked_now)
    assert isinstance(result, ClassifyResult)
    answers = [
        one if one.error is None else replace(one, error=visible(one.error, name))
        for one, name in zip(made.answers(result), made.names, strict=True)
    ]
    masses = {verdict.classifier: verdict.label_mass for verdict in result.verdicts}
    return Typed(
        model=model if router.knows(model) else service_of(request).base_name,
        names=made.names,
        answers=answers,
        masses=[masses[name] for name in made.names],
        usage=result.usage,
    )


def _config(request: Request) -> ServerConfig:
    config: ServerConfig = request.app.state.config
    return config


def type_in(types: Collection[str]) -> Callable[[Any], str | None]:
    """Return what finds a question's type, or None where it is none of `types`."""

    def found(value: Any) -> str | None:
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return kind if kind in types else None

    return found


def words_of(value: Any) -> str:
    """Return words that may be structured as text."""
    return "" if value is None else value if isinstance(value, str) else compact_json(value)


def error_of(info: ErrorInfo, question: str, name: str) -> LoraplexError:
    """Return a question's error as one of the whole request, which names the question. name: who was to answer."""
    return raised(name, replace(info, message=f"{quoted(question)}: {info.message}"))


class OurAdapter(TypedDict):
    name: str
    version: str


class Ours(TypedDict):
    """Holds what an answer says beside its client's fields.

    x_verdict_id:  identifies the verdict, for feedback.
    x_adapter:     the adapter that answered; null where none was trained for the question.
    x_label:       the verdict's label, which heeds the contract's `threshold`.
    x_scores:      label -> probability, in the contract's order; on /v1/decisions.
    """

    x_verdict_id: NotRequired[str]
    x_adapter: OurAdapter | None
    x_label: NotRequired[str]
    x_scores: NotRequired[Mapping[str, float]]
    x_abstained: NotRequired[bool]
    x_warnings: NotRequired[Seq[str]]


def ours_of(answer: Answer) -> dict[str, Any]:
    """Return the fields of `Ours`."""
    adapter = answer.adapter
    fields: dict[str, Any] = {
        "x_verdict_id": answer.verdict_id,
        "x_label": answer.label,
        "x_abstained": answer.abstained or None,
        "x_warnings": answer.warnings,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    fields["x_adapter"] = None if adapter is None else {"name": adapter.name, "version": adapter.version}
    return fields


def response_of(content: Mapping[str, Any]) -> Response:
    """Return the answer as JSON, with the request's id under TypeSafe's name, too."""
    written = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Response(
        encodable(written).encode(), media_type="application/json", headers={TYPESAFE_ID: logs.current().id}
    )
