"""The body of Hugging Face's containers: `{"inputs", "parameters"}` -> labels with scores, or generated texts."""

import json
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, Field, Tag

from loraplex.errors import InvalidRequestError, LoraplexError
from loraplex.generation import GenerateRequest
from loraplex.messages import MAX_ITEMS
from loraplex.problems import either
from loraplex.server.answers import visible_json
from loraplex.server.classification import lone
from loraplex.server.openai import generated_texts
from loraplex.server.routes import answered, router_of, service_of
from loraplex.server.schemas import Body
from loraplex.types import BatchResult, ClassifyRequest, Verdict

LABELS = frozenset({"top_k", "return_all_scores", "function_to_apply", "truncation"})  # parameters of classifiers
MAX_NEW_TOKENS = 20  # transformers' default


class HuggingFaceParameters(Body):
    """The first four are for classifiers, the others for adapters that generate text. What they do is what
    transformers' pipelines do."""

    top_k: int | None = Field(None, ge=1, description="number of labels, likeliest first; null: all of them")
    return_all_scores: bool | None = Field(None, description="older name of `top_k: null`; in the contract's order")
    function_to_apply: Literal["softmax"] | None = None
    truncation: Literal[True] | None = Field(None, description="what a contract does anyway: it cuts the oldest turns")
    max_new_tokens: int | None = Field(None, ge=1, description=f"default {MAX_NEW_TOKENS}")
    return_full_text: bool | None = Field(None, description="begin the answer with the prompt; default true")
    do_sample: bool | None = Field(None, description="default: whether `temperature` or `top_p` is given")
    temperature: float | None = Field(None, gt=0)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=16)
    adapter_id: str | None = Field(None, description="name of the adapter or route, if no header names it")
    details: Literal[False] | None = None

    def given(self) -> set[str]:
        """Return the names of the parameters that are not null."""
        return {name for name in self.model_fields_set if getattr(self, name) is not None}


class HuggingFaceBody(Body):
    inputs: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Tag("list"), Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)],
        either("text or a list of texts"),
    ]
    parameters: HuggingFaceParameters | None = None
    options: dict[str, Any] | None = Field(None, description="accepted for compatibility; changes nothing")


class ScoredLabel(BaseModel):
    label: str
    score: float


class GeneratedText(BaseModel):
    generated_text: str


async def huggingface_answer(request: Request, body: HuggingFaceBody, name: str | None) -> list[Any]:
    """Answer as transformers' pipelines do: an adapter with labels classifies; any other, and the base (None), goes on
    with the text. The error of one text stands in its place; if all fail, the first is raised."""
    parameters = body.parameters or HuggingFaceParameters()
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    answers = None if name is None else await _labelled(request, texts, parameters, name)
    if answers is None:
        answers = await _generated(request, texts, parameters, name)
        return answers if isinstance(body.inputs, str) else [[one] for one in answers]
    is_flat = isinstance(body.inputs, str) and "top_k" in parameters.model_fields_set
    return answers[0] if is_flat and isinstance(answers[0], list) else answers


async def _labelled(
    request: Request, texts: list[str], parameters: HuggingFaceParameters, name: str
) -> list[Any] | None:
    """Return the labels of each text; None where the adapter has no labels."""
    info = service_of(request).adapter(router_of(request).resolve(name))
    for_text = parameters.given() - LABELS - {"adapter_id"}
    if info.labels is not None:
        _check(name, for_text, "has labels and generates no text")
    elif info.version is not None:
        return None
    # An adapter that was not read yet shows only now whether it has labels.
    asked = [ClassifyRequest(input=text, classifiers=(name,), cascade=False) for text in texts]
    result = await answered(request, *asked, is_batch=True)
    assert isinstance(result, BatchResult)
    outcomes = [lone(one) for one in result.results]
    if all(isinstance(one, LoraplexError) or one.scores is None for one in outcomes):
        return None
    _check(name, for_text, "has labels and generates no text")
    return [_scored(one, parameters) for one in outcomes]


async def _generated(
    request: Request, texts: list[str], parameters: HuggingFaceParameters, name: str | None
) -> list[dict[str, str]]:
    _check(name, parameters.given() & LABELS, "has no labels, and generates text")
    sampled = parameters.do_sample
    if sampled is None:
        sampled = parameters.temperature is not None or parameters.top_p is not None
    asked = [
        GenerateRequest(
            prompt=text,
            adapter=None if name is None else router_of(request).resolve(name),
            max_tokens=parameters.max_new_tokens or MAX_NEW_TOKENS,
            temperature=(parameters.temperature or 1.0) if sampled else 0.0,
            top_p=(parameters.top_p or 1.0) if sampled else 1.0,
            seed=parameters.seed,
            stop=tuple(parameters.stop or ()),
            skip_special_tokens=True,
        )
        for text in texts
    ]
    results = await generated_texts(request, service_of(request).base_name if name is None else name, asked)
    prompts = texts if parameters.return_full_text is not False else [""] * len(texts)
    return [{"generated_text": before + one.text} for before, one in zip(prompts, results, strict=True)]


def _check(name: str | None, unfit: set[str], why: str) -> None:
    if unfit:
        who = "the base" if name is None else repr(name)
        raise InvalidRequestError(
            f"parameters.{min(unfit)}: {who} {why}", remedy="leave it out, or ask another adapter"
        )


def _scored(outcome: Verdict | LoraplexError, parameters: HuggingFaceParameters) -> Any:
    """Return the answer to one text: a label, or a list of them where the parameters ask for several."""
    if isinstance(outcome, LoraplexError):
        return visible_json(outcome)
    scores: Any = outcome.scores or {outcome.label: outcome.confidence}  # a route may lead to one without labels, too
    if "top_k" in parameters.model_fields_set:
        scores = dict(sorted(scores.items(), key=lambda one: one[1], reverse=True)[: parameters.top_k])
    scored = [{"label": label, "score": score} for label, score in scores.items()]
    if "top_k" in parameters.model_fields_set or parameters.return_all_scores:
        return scored
    return {"label": outcome.label, "score": outcome.confidence}


def to_json(answers: Any) -> bytes:
    return json.dumps(answers, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
