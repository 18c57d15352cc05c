"""vLLM's HTTP routes /tokenize and /detokenize."""

from typing import Annotated, Self

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from loraplex.generation import GenerateRequest
from loraplex.messages import MAX_ITEMS, MessageBody
from loraplex.problems import NumbersAreNoBooleans, wrong
from loraplex.server.json_body import JsonRoute
from loraplex.server.openai import resolve_model
from loraplex.server.openai_schemas import document, refuse_unknown
from loraplex.server.routes import ERRORS, service_of
from loraplex.server.schemas import RoleNames

router = APIRouter(tags=["openai"], route_class=JsonRoute)


class TokenizeBody(NumbersAreNoBooleans):
    """A text, or messages as /v1/chat/completions takes them."""

    model_config = ConfigDict(extra="allow", json_schema_extra=document)

    model: str | None = Field(None, description="name of an adapter, a route or the base; default: the base")
    prompt: str | None = None
    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=MAX_ITEMS)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="add special tokens, such as a BOS; default true for `prompt`, false for `messages`"
    )
    chat_template_kwargs: dict[str, bool | int | str] | None = Field(
        None, description="variables of the base's chat template, such as enable_thinking"
    )
    roles: RoleNames | None = None
    return_token_strs: bool | None = Field(None, description="also return each token as the vocabulary writes it")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise wrong("give either `prompt` or `messages`", "give `prompt` a text, or `messages` a conversation")
        return self


class TokenizeAnswer(BaseModel):
    """count: how many tokens there are. max_model_len: the most tokens of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(NumbersAreNoBooleans):
    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="name of an adapter, a route or the base; default: the base")
    tokens: list[int]


class DetokenizeAnswer(BaseModel):
    prompt: str


@router.post("/tokenize", responses=ERRORS)
async def tokenize(request: Request, body: TokenizeBody) -> TokenizeAnswer:
    """Return the tokens of a text, however long it is, or those of messages in the prompt that the model is asked with:
    through the adapter's contract or, without a contract, through the base's chat template."""
    refuse_unknown(body.model_extra or {}, TokenizeBody.model_fields)
    service = service_of(request)
    messages = tuple(one.to_message() for one in body.messages or ())
    asked = GenerateRequest(
        prompt=messages if body.prompt is None else body.prompt,
        adapter=_adapter(request, body.model),
        add_special_tokens=body.add_special_tokens,
        chat_template_kwargs=body.chat_template_kwargs or {},
        roles=body.roles,
    )
    tokens, pieces = await service.prompts.tokenize(asked)
    return TokenizeAnswer(
        count=len(tokens),
        max_model_len=service.base.max_model_len,
        tokens=list(tokens),
        token_strs=pieces if body.return_token_strs else None,
    )


@router.post("/detokenize", responses=ERRORS)
async def detokenize(request: Request, body: DetokenizeBody) -> DetokenizeAnswer:
    """Return the text of tokens, with its special tokens."""
    return DetokenizeAnswer(
        prompt=await service_of(request).prompts.detokenize(body.tokens, _adapter(request, body.model))
    )


def _adapter(request: Request, model: str | None) -> str | None:
    return None if model is None else resolve_model(request, model, None)
