"""`POST /v1/decisions`: OpenAI's typed questions. Each is answered by its own classifier."""

from collections.abc import Sequence as Seq
from typing import Annotated, Any, Literal, NotRequired

from fastapi import APIRouter, Request, Response
from pydantic import Field, Tag, field_validator
from typing_extensions import TypedDict

from loraplex.decisions import Answer
from loraplex.messages import MAX_ITEMS, PartBody
from loraplex.problems import either, wrong
from loraplex.questions import MAX_LABELS, MAX_QUESTIONS
from loraplex.routing.questions import Asked
from loraplex.server.json_body import JsonRoute
from loraplex.server.routes import ERRORS
from loraplex.server.schemas import Body
from loraplex.server.typed import Ours, Typed, TypedBody, decide, ours_of, response_of, type_in
from loraplex.server.typed_errors import DECISIONS
from loraplex.state import placed_items
from loraplex.types import PREDICATE_LABELS, ErrorInfo, Question

router = APIRouter(tags=["decisions"], route_class=JsonRoute)

TYPES = ("predicate", "choice", "score")

Instructions = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[PartBody], Tag("list"), Field(max_length=MAX_ITEMS, fail_fast=True)],
    either("text or a list of text parts"),
]
Value = Annotated[
    Annotated[str, Tag("text")] | Annotated[bool, Tag("boolean")],
    either("text, true or false", lambda value: {str: "text", bool: "boolean"}.get(type(value))),
]


class _Question(Body):
    name: str | None = Field(None, description="the classifier or route that answers, unless `model` names one")
    instructions: Instructions = Field(description="read only to compare them with the contract's question")

    def words(self) -> str:
        given = self.instructions
        return given if isinstance(given, str) else "\n".join(one.content for one in given)


class CriteriaBody(Body):
    true: str | None = None
    false: str | None = None


class PredicateQuestion(_Question):
    type: Literal["predicate"]
    x_labels: list[str] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="what either answer is called, the one that holds first; by default yes and no",
    )
    x_criteria: CriteriaBody | None = Field(None, description="what either answer means; Loraplex's own")

    @field_validator("x_labels")
    @classmethod
    def _differ(cls, given: list[str] | None) -> list[str] | None:
        if given is not None and len({label.strip() for label in given}) < 2:
            raise wrong("names one answer only", "give each answer a name of its own")
        return given


class ChoiceBody(Body):
    value: Value = Field(description="a label; true and false are the labels `true` and `false`")
    description: str | None = None


class ChoiceQuestion(_Question):
    type: Literal["choice"]
    choices: list[ChoiceBody] = Field(min_length=2, max_length=MAX_LABELS)


class LevelBody(Body):
    label: str
    description: str | None = None


class ScoreQuestion(_Question):
    type: Literal["score"]
    levels: list[LevelBody] = Field(min_length=2, max_length=MAX_LABELS, description="from the lowest to the highest")


AnyQuestion = Annotated[
    Annotated[PredicateQuestion, Tag("predicate")]
    | Annotated[ChoiceQuestion, Tag("choice")]
    | Annotated[ScoreQuestion, Tag("score")],
    either("an object whose `type` is predicate, choice or score", type_in(TYPES)),
]


class DecisionsBody(TypedBody):
    """Typed questions about one input. `model` is a classifier or route, which answers all of them; or the base, "*" or
    an alias, and each question's name is its classifier."""

    model: str
    input: Annotated[Annotated[str, Tag("text")] | Annotated[list[Any], Tag("list")], either("text or a list of items")]
    questions: list[AnyQuestion] = Field(min_length=1, max_length=MAX_QUESTIONS)


class PredicateAnswer(Ours):
    type: Literal["predicate"]
    name: str | None
    probability: float


class ValueProbability(TypedDict):
    value: str | bool
    probability: float


class ChoiceAnswer(Ours):
    type: Literal["choice"]
    name: str | None
    choice: str | bool
    confidence: float
    probabilities: list[ValueProbability]


class LevelProbability(TypedDict):
    value: int
    label: str
    probability: float


class ScoreAnswer(Ours):
    type: Literal["score"]
    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


class RefusalAnswer(Ours):
    """Stands for a verdict that abstained, for a classifier that failed, and for one that its gate let not run."""

    type: Literal["refusal"]
    name: str | None
    x_error: NotRequired[ErrorInfo]
    x_skipped_by: NotRequired[str]


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class DecisionsUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Diagnosis(TypedDict):
    label_mass: float


class DecisionsResult(TypedDict):
    model: str
    answers: list[PredicateAnswer | ChoiceAnswer | ScoreAnswer | RefusalAnswer]
    usage: DecisionsUsage
    diagnostics: dict[str, Diagnosis]


@router.post(DECISIONS, response_model=DecisionsResult, responses=ERRORS)
async def decisions(request: Request, body: DecisionsBody) -> Response:
    """Answer typed questions about one input, as OpenAI's decisions do.

    A question that nobody can answer with confidence is a `refusal`; the others are answered.
    """
    return await decisions_answer(request, body, body.model)


async def decisions_answer(request: Request, body: DecisionsBody, model: str | None) -> Response:
    state = body.input if isinstance(body.input, str) else placed_items(body.input)
    asked = [_asked(f"questions.{index}", one) for index, one in enumerate(body.questions)]
    typed = await decide(request, body, asked, state, field="input", model=model)
    usage, names = typed.usage, [one.name for one in body.questions]
    return response_of(
        {
            "model": typed.model,
            "answers": [
                _answer(question, answer) for question, answer in zip(body.questions, typed.answers, strict=True)
            ],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": 0,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens,
            },
            "diagnostics": diagnostics_of(names, typed),
        }
    )


def diagnostics_of(names: Seq[str | None], typed: Typed) -> dict[str, Any]:
    """Return the diagnostics of the questions that have a name."""
    masses = zip(names, typed.masses, strict=True)
    return {name: {"label_mass": mass} for name, mass in masses if name is not None and mass is not None}


def _asked(place: str, given: PredicateQuestion | ChoiceQuestion | ScoreQuestion) -> Asked:
    descriptions: dict[str, str | None] = {}
    options = "instructions"
    if isinstance(given, ChoiceQuestion):
        labels = tuple(map(_label, (one.value for one in given.choices)))
        options, descriptions = "choices", {_label(one.value): one.description for one in given.choices}
    elif isinstance(given, ScoreQuestion):
        labels = tuple(one.label for one in given.levels)
        options, descriptions = "levels", {one.label: one.description for one in given.levels}
    else:
        labels = tuple(given.x_labels or PREDICATE_LABELS)
        if given.x_criteria is not None:
            descriptions = dict(zip(labels, (given.x_criteria.true, given.x_criteria.false), strict=True))
    question = Question(
        type=given.type,
        instructions=given.words(),
        labels=labels,
        descriptions={label: text for label, text in descriptions.items() if text},
    )
    return Asked(place=place, options=options, name=given.name, question=question)


def _label(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else value


def _answer(question: PredicateQuestion | ChoiceQuestion | ScoreQuestion, answer: Answer) -> dict[str, Any]:
    head, ours = {"name": question.name}, ours_of(answer)
    if answer.error is not None:
        error = answer.error
        shown = {"code": error.code, "message": error.message, "remedy": error.remedy}
        return {"type": "refusal", **head, **ours, "x_error": shown}
    if answer.skipped_by is not None:
        return {"type": "refusal", **head, **ours, "x_skipped_by": answer.skipped_by}
    ours["x_scores"] = dict(answer.scores or {})
    if answer.abstained:
        return {"type": "refusal", **head, **ours}
    head = {"type": answer.type, **head}
    if isinstance(question, PredicateQuestion):
        return {**head, "probability": answer.probability, **ours}
    probabilities = [*(answer.probabilities or {}).values()]
    if isinstance(question, ChoiceQuestion):
        values = {_label(one.value): one.value for one in question.choices}
        listed: list[dict[str, Any]] = [
            {"value": value, "probability": one} for value, one in zip(values.values(), probabilities, strict=True)
        ]
        return {
            **head,
            "choice": values[answer.choice or ""],
            "confidence": answer.confidence,
            "probabilities": listed,
            **ours,
        }
    listed = [
        {"value": level, "label": body.label, "probability": one}
        for level, (body, one) in enumerate(zip(question.levels, probabilities, strict=True))
    ]
    return {**head, "score": answer.score, "confidence": answer.confidence, "probabilities": listed, **ours}
