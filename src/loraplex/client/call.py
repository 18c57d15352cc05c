"""The API's calls: what is sent, which type comes back, and what may be sent twice. Does no I/O."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from loraplex.decisions import Answer as TypedAnswer
from loraplex.decisions import Decisions, answer_of, failed, skipped
from loraplex.discovery import SkippedFolder
from loraplex.messages import conversation_of, message_json
from loraplex.questions import check_deadline, given_questions, given_state
from loraplex.types import (
    AdapterInfo,
    AdapterRef,
    ClassifyResult,
    ErrorInfo,
    Examples,
    Input,
    ModelInfo,
    Question,
    Roles,
    Route,
    RouteStats,
    Usage,
    Verdict,
    classifier_names,
)

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Answer]):
    """One request.

    answer:       the type of its JSON answer.
    is_safe:      changes nothing, so it may be sent again even if the server has already carried it out.
    is_once:      sent again only if the server cannot have carried it out, because a second time would do more.
    is_slow:      loads or drains an adapter, so an attempt has no timeout.
    is_probe:     sent once, with a short timeout: "no" is an answer.
    deadline_ms:  milliseconds for all attempts together.
    """

    method: str
    path: str
    answer: type[Answer]
    body: Mapping[str, Any] | None = None
    is_safe: bool = False
    is_once: bool = False
    is_slow: bool = False
    is_probe: bool = False
    deadline_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Adapters:
    adapters: tuple[AdapterInfo, ...]
    skipped: tuple[SkippedFolder, ...] = ()  # an older server sends none


@dataclass(frozen=True, slots=True)
class Models:
    data: tuple[ModelInfo, ...]


@dataclass(frozen=True, slots=True)
class Routes:
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class Feedback:
    num_answers: int


Done = dict[str, Any]  # an answer without further meaning


def _path(kind: str, name: str, *rest: str) -> str:
    return "/".join(("/v1", kind, quote(name, safe=""), *rest))


def _get(path: str, answer: type[Answer]) -> Call[Answer]:
    return Call(method="GET", path=path, answer=answer, is_safe=True)


def classify(
    input: Input,
    classifiers: str | Iterable[str],
    conversation_id: str | None,
    deadline_ms: float | None,
    roles: Roles | None = None,
    cascade: bool = True,
) -> Call[ClassifyResult]:
    check_deadline(deadline_ms)
    conversation = conversation_of(input)
    body = {
        "input": conversation if isinstance(conversation, str) else [message_json(one) for one in conversation],
        "classifiers": classifier_names(classifiers),
        "deadline_ms": deadline_ms,
        "conversation_id": conversation_id,
        "roles": None if roles is None else dict(roles),
        "cascade": None if cascade else False,
    }
    body = {name: value for name, value in body.items() if value is not None}
    return Call(
        method="POST",
        path="/v1/classify",
        answer=ClassifyResult,
        body=body,
        is_safe=True,
        deadline_ms=deadline_ms,
    )


@dataclass(frozen=True, slots=True)
class InputDetails:
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class DecisionsUsage:
    input_tokens: int
    input_tokens_details: InputDetails


@dataclass(frozen=True, slots=True)
class DecisionsAnswer:
    """The answer of /v1/decisions, as far as `Decisions` needs it."""

    answers: tuple[dict[str, Any], ...]
    usage: DecisionsUsage

    def decisions(self, questions: Mapping[str, Question]) -> Decisions:
        """Return the answers to the questions that were asked."""
        answers = zip(questions.items(), self.answers, strict=True)
        num_prompt, num_cached = self.usage.input_tokens, self.usage.input_tokens_details.cached_tokens
        return Decisions(
            answers={name: _answer(name, question, answer) for (name, question), answer in answers},
            usage=Usage(prompt_tokens=num_prompt, computed_tokens=num_prompt - num_cached, cached_tokens=num_cached),
        )


def _answer(name: str, question: Question, given: Mapping[str, Any]) -> TypedAnswer:
    """Return an answer. `x_scores` says how probable each label is, in the contract's order."""
    if (gate := given.get("x_skipped_by")) is not None:
        return skipped(question, gate)
    adapter, error = given.get("x_adapter"), given.get("x_error")
    verdict = Verdict(
        id=given.get("x_verdict_id"),
        classifier=name,
        label=given.get("x_label"),
        scores=given.get("x_scores"),
        abstained=given["type"] == "refusal" and error is None,
        adapter=None if adapter is None else AdapterRef(**adapter),
        warnings=tuple(given.get("x_warnings", ())) or None,
    )
    return answer_of(question, verdict) if error is None else failed(question, verdict, ErrorInfo(**error))


def decide(
    state: Any,
    questions: Mapping[str, Question],
    model: str,
    conversation_id: str | None,
    deadline_ms: float | None,
    roles: Roles | None,
    cascade: bool = True,
) -> Call[DecisionsAnswer]:
    questions, conversation = given_questions(questions), given_state(state)
    check_deadline(deadline_ms)
    body = {
        "model": model,
        "input": conversation if isinstance(conversation, str) else [message_json(one) for one in conversation],
        "questions": [_question(name, one) for name, one in questions.items()],
        "deadline_ms": deadline_ms,
        "conversation_id": conversation_id,
        "roles": None if roles is None else dict(roles),
        "cascade": None if cascade else False,
    }
    body = {name: value for name, value in body.items() if value is not None}
    return Call(
        method="POST", path="/v1/decisions", answer=DecisionsAnswer, body=body, is_safe=True, deadline_ms=deadline_ms
    )


def _question(name: str, question: Question) -> dict[str, Any]:
    body: dict[str, Any] = {"type": question.type, "name": name, "instructions": question.instructions}
    if question.type == "predicate":
        body["x_labels"] = question.labels
        if question.descriptions:
            described = (question.descriptions.get(label) for label in question.labels)
            body["x_criteria"] = dict(zip(("true", "false"), described, strict=True))
    options, label = {"choice": ("choices", "value"), "score": ("levels", "label")}.get(question.type, ("", ""))
    if options:
        body[options] = [
            {label: one} | ({"description": question.descriptions[one]} if one in question.descriptions else {})
            for one in question.labels
        ]
    return body


def feedback(
    verdict_id: str | None, label: str, request_id: str | None = None, classifier: str | None = None
) -> Call[Feedback]:
    named = {"verdict_id": verdict_id, "request_id": request_id, "classifier": classifier}
    body = {name: value for name, value in named.items() if value is not None}
    return Call(method="POST", path="/v1/feedback", answer=Feedback, body={**body, "label": label})


MODELS = _get("/v1/models", Models)
READY = Call(method="GET", path="/ready", answer=Done, is_probe=True)

ADAPTERS = _get("/v1/adapters", Adapters)


def adapter(name: str) -> Call[AdapterInfo]:
    return _get(_path("adapters", name), AdapterInfo)


def load_adapter(name: str, source: str | PathLike[str], pin: bool | None) -> Call[AdapterInfo]:
    body = {"source": str(source), "pinned": pin}
    return Call(method="PUT", path=_path("adapters", name), answer=AdapterInfo, body=body, is_slow=True)


def unload_adapter(name: str) -> Call[Done]:
    return Call(method="DELETE", path=_path("adapters", name), answer=Done, is_slow=True)


def pin_adapter(name: str, is_pinned: bool) -> Call[AdapterInfo]:
    method = "PUT" if is_pinned else "DELETE"
    return Call(method=method, path=_path("adapters", name, "pin"), answer=AdapterInfo, is_slow=True)


ROUTES = _get("/v1/routes", Routes)


def route(name: str) -> Call[Route]:
    return _get(_path("routes", name), Route)


def set_route(name: str, targets: Mapping[str, float], shadows: Iterable[str]) -> Call[Route]:
    body = {"targets": dict(targets), "shadows": list(shadows)}
    return Call(method="PUT", path=_path("routes", name), answer=Route, body=body)


def delete_route(name: str) -> Call[Done]:
    return Call(method="DELETE", path=_path("routes", name), answer=Done)


def rollback_route(name: str) -> Call[Route]:
    return Call(method="POST", path=_path("routes", name, "rollback"), answer=Route, is_once=True)


def route_stats(name: str) -> Call[RouteStats]:
    return _get(_path("routes", name, "stats"), RouteStats)


def examples(
    classifiers: str | Iterable[str], since_s: float | None, is_corrected: bool, after: str | None
) -> Call[Examples]:
    names = classifier_names(classifiers)
    body = {"classifiers": names, "only": "corrected" if is_corrected else "all", "since_s": since_s, "after": after}
    body = {name: value for name, value in body.items() if value is not None}
    return Call(method="POST", path="/v1/examples", answer=Examples, body=body, is_safe=True)
