"""The HTTP routes that classify: Loraplex's own, and vLLM's and SGLang's, which answer with the probability of each
label."""

import time
import uuid
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from loraplex.errors import InvalidRequestError, LoraplexError, error_answered
from loraplex.messages import MAX_ITEMS, MessageBody
from loraplex.problems import either, wrong
from loraplex.server.json_body import JsonRoute
from loraplex.server.openai_answers import CompletionUsage, PromptTokensDetails
from loraplex.server.routes import ERRORS, answer, answered
from loraplex.server.schemas import Body, ClassifyBody, RoleNames
from loraplex.types import BatchResult, ClassifyRequest, ClassifyResult, Failure, Verdict

router = APIRouter(tags=["classify"], route_class=JsonRoute)


class ClassificationBody(Body):
    """vLLM's and SGLang's body. `model` is one classifier or route."""

    model: str
    input: (
        Annotated[
            Annotated[str, Tag("text")]
            | Annotated[list[str], Tag("list"), Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)],
            either("text or a list of texts"),
        ]
        | None
    ) = None
    messages: list[MessageBody] | None = Field(None, min_length=1, max_length=MAX_ITEMS)
    roles: RoleNames | None = None
    user: Any = Field(None, description="accepted for compatibility; changes nothing, like the next three")
    rid: Any = None
    request_id: Any = None
    priority: Any = None
    add_special_tokens: Literal[True] | None = None
    activation: Literal[True] | None = None
    softmax: Literal[True] | None = None
    use_activation: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise wrong("give either `input` or `messages`", "give `input` a text or texts, or `messages` one chat")
        return self

    def to_requests(self) -> list[ClassifyRequest]:
        """Return one request for each text."""
        if self.messages is not None:
            inputs: list[Any] = [tuple(one.to_message() for one in self.messages)]
        else:
            inputs = [self.input] if isinstance(self.input, str) else list(self.input or ())
        return [
            ClassifyRequest(input=one, classifiers=(self.model,), roles=self.roles, cascade=False) for one in inputs
        ]


class ClassificationData(BaseModel):
    """probs: the labels' probabilities in the contract's order, after calibration. `label` heeds its threshold."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassificationData]
    usage: CompletionUsage


def classify_kind(body: Any) -> Literal["native", "vllm"]:
    """Return whose body it is. Loraplex's own has no `model`."""
    return (
        "vllm"
        if isinstance(body, dict) and "model" in body and not body.keys() & {"classifiers", "inputs", "questions"}
        else "native"
    )


AnyClassifyBody = Annotated[
    Annotated[ClassifyBody, Tag("native")] | Annotated[ClassificationBody, Tag("vllm")], Discriminator(classify_kind)
]


@router.post("/v1/classify", response_model=ClassifyResult | BatchResult | Classification, responses=ERRORS)
async def classify(request: Request, body: AnyClassifyBody) -> Response:
    """Classify one conversation, or each of several, with any number of classifiers.

    All classifiers of a call share one forward pass where they fit. A body with `model` is vLLM's or SGLang's, and is
    answered as they do.
    """
    return await (answer(request, body) if isinstance(body, ClassifyBody) else classification(request, body))


@router.post("/classify", response_model=Classification, responses=ERRORS)
async def vllm_classify(request: Request, body: ClassificationBody) -> Response:
    """Return the probability of each label, through vLLM's path."""
    return await classification(request, body)


async def classification(request: Request, body: ClassificationBody) -> Response:
    """Answer in vLLM's shape. It has no place for the error of one text, so the first error is raised."""
    result = await answered(request, *body.to_requests(), is_batch=True)
    assert isinstance(result, BatchResult)
    usage = result.usage
    answer = Classification(
        id=f"classify-{uuid.uuid4().hex}",
        object="list",
        created=int(time.time()),
        model=body.model,
        data=[_data(index, verdict) for index, verdict in enumerate(verdicts_of(result))],
        usage=CompletionUsage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=0,
            total_tokens=usage.prompt_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        ),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def verdicts_of(result: BatchResult) -> list[Verdict]:
    """Return the one verdict of each result. Raises the first error."""
    outcomes = [lone(one) for one in result.results]
    for outcome in outcomes:
        if isinstance(outcome, LoraplexError):
            raise outcome
    return [one for one in outcomes if isinstance(one, Verdict)]


def lone(result: ClassifyResult | Failure) -> Verdict | LoraplexError:
    """Return the verdict of a result with one verdict, or the error in its place."""
    if isinstance(result, ClassifyResult):
        [verdict] = result.verdicts
        return verdict
    error = result.error
    return error_answered(error.code, error.message, remedy=error.remedy)


def _data(index: int, verdict: Verdict) -> ClassificationData:
    if verdict.scores is None or verdict.label is None:
        raise InvalidRequestError(
            f"{verdict.classifier!r} has no labels, so there are no probabilities of labels",
            remedy="give it a classifier.yaml with `labels`, or ask it with `classifiers` in place of `model`",
        )
    probs = list(verdict.scores.values())
    return ClassificationData(index=index, label=verdict.label, probs=probs, num_classes=len(probs))
