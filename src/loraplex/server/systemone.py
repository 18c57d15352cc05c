"""`POST /v1/systemone`: TypeSafe's typed questions. Each is answered by its own classifier."""

from typing import Annotated, Any, Literal, NotRequired

from fastapi import APIRouter, Request, Response
from pydantic import Field, Tag
from typing_extensions import TypedDict

from loraplex.decisions import Answer
from loraplex.problems import either
from loraplex.questions import MAX_LABELS
from loraplex.routing.questions import Asked
from loraplex.server.decisions import Diagnosis, diagnostics_of
from loraplex.server.json_body import JsonRoute
from loraplex.server.routes import ERRORS
from loraplex.server.schemas import Body
from loraplex.server.typed import (
    Ours,
    TypedBody,
    Words,
    decide,
    error_of,
    ours_of,
    response_of,
    type_in,
    words_of,
)
from loraplex.server.typed_errors import SYSTEMONE
from loraplex.state import placed_state
from loraplex.types import Question

router = APIRouter(tags=["decisions"], route_class=JsonRoute)

MAX_QUESTIONS = 4096
PATIENCE_S = 5.0  # TypeSafe's client gives up after 10 seconds, and asks again where it was told to
TYPES = ("noul", "choice", "score")


class _Question(Body):
    instructions: Words | None = Field(None, description="read only to compare them with the contract's question")


class NoulCriteria(Body):
    true: Words | None = None
    false: Words | None = None


class NoulQuestion(_Question):
    type: Literal["noul"]
    criteria: NoulCriteria | None = None


class ChoiceQuestion(_Question):
    type: Literal["choice"]
    criteria: dict[str, Words | None] = Field(min_length=2, max_length=MAX_LABELS, description="label -> meaning")


class ScoreQuestion(_Question):
    type: Literal["score"]
    criteria: list[Words] = Field(min_length=2, max_length=MAX_LABELS, description="from the lowest to the highest")


AnyQuestion = Annotated[
    Annotated[NoulQuestion, Tag("noul")]
    | Annotated[ChoiceQuestion, Tag("choice")]
    | Annotated[ScoreQuestion, Tag("score")],
    either("an object whose `type` is noul, choice or score", type_in(TYPES)),
]


class SystemOneBody(TypedBody):
    """Typed questions about one state, by name. `model` is a classifier or route, which answers all of them; or the
    base, "*" or an alias, and each question's name is its classifier."""

    state: Words
    cascade: bool = Field(
        False,
        strict=True,
        description="true lets gates skip questions (`when` in loraplex.yaml); `x_skipped` then names them",
    )
    model: str | None = None
    questions: dict[Annotated[str, Field(min_length=1)], AnyQuestion] = Field(min_length=1, max_length=MAX_QUESTIONS)


class NoulAnswer(Ours):
    type: Literal["noul"]
    noul: float


class ChoiceAnswer(Ours):
    type: Literal["choice"]
    choice: str
    confidence: float
    probabilities: dict[str, float]


class ScoreAnswer(Ours):
    type: Literal["score"]
    score: float
    confidence: float
    legend: dict[str, str | dict[str, Any] | list[Any]]
    probabilities: dict[str, float]


class SystemOneUsage(TypedDict):
    input_tokens: int
    output_tokens: int
    x_cached_tokens: int


class SystemOneResult(TypedDict):
    model: str
    answers: dict[str, NoulAnswer | ChoiceAnswer | ScoreAnswer]
    usage: SystemOneUsage
    diagnostics: dict[str, Diagnosis]
    x_skipped: NotRequired[dict[str, str]]


@router.post(SYSTEMONE, response_model=SystemOneResult, responses=ERRORS)
async def systemone(request: Request, body: SystemOneBody) -> Response:
    """Answer typed questions about one state, as TypeSafe's System One does. If one of them cannot be answered, its
    error is the answer."""
    return await systemone_answer(request, body, body.model)


async def systemone_answer(request: Request, body: SystemOneBody, model: str | None) -> Response:
    asked = [_asked(name, one) for name, one in body.questions.items()]
    state = placed_state(body.state)
    typed = await decide(request, body, asked, state, field="state", model=model, patience_s=PATIENCE_S)
    answers = dict(zip(body.questions, typed.answers, strict=True))
    for (question, answer), name in zip(answers.items(), typed.names, strict=True):
        if answer.error is not None:
            raise error_of(answer.error, question, name)
    usage = typed.usage
    skipped = {name: answer.skipped_by for name, answer in answers.items() if answer.skipped_by is not None}
    return response_of(
        {
            "model": typed.model,
            "answers": {
                name: _answer(body.questions[name], answer)
                for name, answer in answers.items()
                if answer.skipped_by is None
            },
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "output_tokens": 0,
                "x_cached_tokens": usage.cached_tokens,
            },
            "diagnostics": diagnostics_of([*answers], typed),
            **({"x_skipped": skipped} if skipped else {}),
        }
    )


def _asked(name: str, given: NoulQuestion | ChoiceQuestion | ScoreQuestion) -> Asked:
    descriptions: dict[str, Any] = {}
    if isinstance(given, NoulQuestion):
        labels: tuple[str, ...] = ("yes", "no")
        if given.criteria is not None:
            descriptions = {"yes": given.criteria.true, "no": given.criteria.false}
    elif isinstance(given, ChoiceQuestion):
        labels, descriptions = tuple(given.criteria), given.criteria
    else:
        labels = tuple(map(words_of, given.criteria))
    question = Question(
        type="predicate" if given.type == "noul" else given.type,
        instructions=words_of(given.instructions),
        labels=labels,
        descriptions={label: words for label, text in descriptions.items() if (words := words_of(text))},
    )
    return Asked(place=f"questions.{name}", options="criteria", name=name, question=question)


def _answer(question: NoulQuestion | ChoiceQuestion | ScoreQuestion, answer: Answer) -> dict[str, Any]:
    ours, probabilities = ours_of(answer), answer.probabilities or {}
    if isinstance(question, NoulQuestion):
        return {"type": "noul", "noul": answer.probability, **ours}
    if isinstance(question, ChoiceQuestion):
        head = {"type": "choice", "choice": answer.choice, "confidence": answer.confidence}
        return {**head, "probabilities": dict(probabilities), **ours}
    return {
        "type": "score",
        "score": answer.score,
        "confidence": answer.confidence,
        "legend": {str(level): words for level, words in enumerate(question.criteria)},
        "probabilities": {str(level): one for level, one in enumerate(probabilities.values())},
        **ours,
    }
