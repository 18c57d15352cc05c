"""Bodies of the OpenAI HTTP routes. A field that Loraplex would have to ignore is refused by name."""

import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag

from loraplex.errors import InvalidRequestError, quoted
from loraplex.generation import GenerateRequest
from loraplex.messages import MAX_ITEMS, MessageBody
from loraplex.problems import NumbersAreNoBooleans, either, unknown_field
from loraplex.server.openai_answers import ChatFormat, CompletionFormat
from loraplex.server.schemas import RoleNames

MAX_CHOICES = 2048  # prompts times `n`

_ANY = None
# Known fields of OpenAI and vLLM, each with the values that are accepted besides null because they change nothing.
NEUTRAL: Mapping[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(
        ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "request_id"), _ANY
    ),
    **dict.fromkeys(("priority", "spaces_between_special_tokens", "parallel_tool_calls"), _ANY),
    "store": (False,),
    "detokenize": (True,),
    "service_tier": ("auto", "default"),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "bad_words": ([],),
    "echo": (False,),  # of completions, it is a field of its own
    "suffix": ("",),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),  # without tools, both mean the same
    "function_call": ("none", "auto"),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "web_search_options"), ()),
    **dict.fromkeys(("documents", "chat_template", "prompt_logprobs", "truncate_prompt_tokens"), ()),
    **dict.fromkeys(("logits_processors", "cache_salt", "kv_transfer_params"), ()),
    **dict.fromkeys(("structured_outputs", "guided_choice", "guided_json", "guided_regex", "guided_grammar"), ()),
}
_REMEDIES = {
    "structured_outputs": "use /v1/classify, which returns one of the contract's labels, or give `allowed_token_ids`",
    "guided_choice": "use /v1/classify, which returns one of the contract's labels, or give `allowed_token_ids`",
    "truncate_prompt_tokens": "use an adapter with a contract: the contract cuts the oldest turns",
}


def _prompt_kind(value: Any) -> str | None:
    if not isinstance(value, list):
        return "text" if isinstance(value, str) else None
    return {str: "texts", int: "ids", list: "id lists"}.get(type(value[0])) if value else "texts"


def document(schema: dict[str, Any]) -> None:
    """Add the fields that change nothing to a body's JSON schema."""
    schema["additionalProperties"] = False
    for name, values in NEUTRAL.items():
        field: dict[str, Any] = {} if values is _ANY else {"enum": [*values, None]}
        schema["properties"].setdefault(name, {"description": "accepted for compatibility; changes nothing", **field})


_Ids = Annotated[list[int], Field(min_length=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: bool | None = None


class _Body(NumbersAreNoBooleans):
    """Fields that both HTTP routes take. A field that is null counts as not given."""

    model_config = ConfigDict(extra="allow", json_schema_extra=document)

    model: str = Field(description="name of an adapter, a route or the base, as /v1/models lists it")
    temperature: float | None = Field(None, ge=0, description="default 1; 0 chooses the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128, description="number of answers to each prompt")
    best_of: int | None = Field(None, description="must equal `n`")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="the same seed draws the same tokens")
    max_completion_tokens: int | None = Field(None, ge=1, description="newer name of `max_tokens`")
    min_tokens: int | None = Field(None, ge=0, description="before so many tokens, none that ends the text is chosen")
    ignore_eos: bool | None = Field(None, description="go on after an end-of-text token; default false")
    stop_token_ids: list[int] | None = Field(
        None, max_length=MAX_ITEMS, description="the answer ends with the first of these tokens, whose text is left out"
    )
    stop: (
        Annotated[
            Annotated[str, Tag("text"), Field(min_length=1)]
            | Annotated[list[Annotated[str, Field(min_length=1)]], Tag("list"), Field(max_length=16)],
            either("text or a list of at most 16 texts"),
        ]
        | None
    ) = Field(None, description="the answer ends before the first of these texts")
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_ITEMS, description="token id -> number added to its logit before a token is chosen"
    )
    allowed_token_ids: list[int] | None = Field(
        None, min_length=1, max_length=MAX_ITEMS, description="only these tokens can be chosen"
    )
    skip_special_tokens: bool | None = Field(None, description="leave special tokens out of the text; default true")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="name tokens `token_id:123` in log probabilities; default false"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    conversation_id: str | None = Field(
        None, description="the same id for every turn: cached work is reused, and a route keeps its target"
    )

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether the stream's last chunk holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def counts_usage(self) -> bool:
        """Whether each of the stream's chunks holds the usage up to it."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def _max_tokens(self, given: int | None) -> int | None:
        """Return `max_tokens`, under either name. Raises InvalidRequestError where the two differ."""
        if None not in (given, self.max_completion_tokens) and given != self.max_completion_tokens:
            raise InvalidRequestError(
                "max_tokens: differs from `max_completion_tokens`, which means the same",
                remedy="leave `max_tokens` out",
            )
        return self.max_completion_tokens if given is None else given

    def _requests(self, prompts: Seq[Any], **fields: Any) -> list[GenerateRequest]:
        """Return `n` requests for each prompt. Each choice of a prompt has its own seed."""
        self._check(len(prompts))
        return [
            GenerateRequest(
                prompt=prompt,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                seed=None if self.seed is None else self.seed + index,
                min_tokens=self.min_tokens or 0,
                ignore_eos=bool(self.ignore_eos),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                logit_bias=self.logit_bias or {},
                allowed_token_ids=tuple(self.allowed_token_ids or ()),
                skip_special_tokens=self.skip_special_tokens is not False,
                conversation_id=self.conversation_id,
                **fields,
            )
            for prompt in prompts
            for index in range(self.num_choices)
        ]

    def _check(self, num_prompts: int) -> None:
        """Raise InvalidRequestError for a field that would have to be ignored."""
        refuse_unknown(self.model_extra or {}, type(self).model_fields)
        if self.best_of is not None and self.best_of != self.num_choices:
            raise InvalidRequestError(f"best_of: {self.best_of} differs from `n`", remedy="leave `best_of` out")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options: needs `stream`", remedy="leave it out, or set `stream` to true")
        if self.counts_usage and not self.includes_usage:
            raise InvalidRequestError(
                "stream_options.continuous_usage_stats: needs `include_usage`", remedy="set `include_usage` to true"
            )
        if num_prompts * self.num_choices > MAX_CHOICES:
            raise InvalidRequestError(
                f"n: {num_prompts} prompts with {self.num_choices} choices each are more than {MAX_CHOICES} choices",
                remedy="send them in several requests",
            )


def refuse_unknown(fields: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise InvalidRequestError for a field that would have to be ignored. known: the fields that there are."""
    for name, value in fields.items():
        if name not in NEUTRAL:
            message, remedy = unknown_field(name, name, known)
            raise InvalidRequestError(message, remedy=f"{remedy}; see /docs for the fields")
        neutral = NEUTRAL[name]
        if value is not None and neutral is not _ANY and value not in neutral:
            others = "".join(f", or give {json.dumps(one)}" for one in neutral)
            raise InvalidRequestError(
                f"{name}: {quoted(value)} is not supported",
                remedy=_REMEDIES.get(name, f"leave it out{others}"),
            )


class CompletionBody(_Body):
    """A prompt, which is taken verbatim, and how to continue it."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Tag("texts"), Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | Annotated[_Ids, Tag("ids")]
        | Annotated[list[_Ids], Tag("id lists"), Field(max_length=MAX_CHOICES, fail_fast=True)],
        either("text, token ids or a list of either", _prompt_kind),
    ]
    max_tokens: int | None = Field(None, ge=0, description="default 16; 0 is for `echo`")
    echo: bool | None = Field(
        None, description="begin the answer with the prompt and, if `logprobs` is given, with its log probabilities"
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="number of likeliest tokens returned with each token")
    add_special_tokens: bool | None = Field(
        None, description="add special tokens, such as a BOS, to a text prompt; default true"
    )

    def to_requests(self, adapter: str | None) -> list[GenerateRequest]:
        """Return one request for each choice. Raises InvalidRequestError for a field that would have to be ignored."""
        if self.echo and self.stream:
            raise InvalidRequestError("echo: is not streamed", remedy="leave `stream` out, or `echo`")
        max_tokens = self._max_tokens(self.max_tokens)
        prompt: Any = self.prompt
        prompts = prompt if _prompt_kind(prompt) in ("texts", "id lists") else [prompt]
        return self._requests(
            [one if isinstance(one, str) else tuple(one) for one in prompts],
            adapter=adapter,
            max_tokens=16 if max_tokens is None else max_tokens,
            num_top=self.logprobs or 0,
            add_special_tokens=self.add_special_tokens,
            echo=bool(self.echo),
            scores_prompt=bool(self.echo) and self.logprobs is not None,
        )

    def format(self) -> CompletionFormat:
        return CompletionFormat(has_logprobs=self.logprobs is not None, names_ids=bool(self.return_tokens_as_token_ids))


class ChatBody(_Body):
    """Messages, formatted by the adapter's contract or, without a contract, by the base's chat template."""

    messages: list[MessageBody] = Field(min_length=1, max_length=MAX_ITEMS)
    max_tokens: int | None = Field(None, ge=1, description="default: as many as fit into the base's context")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="number of likeliest tokens returned with each token"
    )
    chat_template_kwargs: dict[str, bool | int | str] | None = Field(
        None, description="variables of the base's chat template, such as enable_thinking"
    )
    add_special_tokens: bool | None = Field(
        None, description="add special tokens to those that the base's chat template writes; default false"
    )
    roles: RoleNames | None = None

    def to_requests(self, adapter: str | None) -> list[GenerateRequest]:
        """Return one request for each choice. Raises InvalidRequestError for a field that would have to be ignored."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs: needs `logprobs`", remedy="set `logprobs` to true")
        return self._requests(
            [tuple(one.to_message() for one in self.messages)],
            adapter=adapter,
            max_tokens=self._max_tokens(self.max_tokens),
            num_top=self.top_logprobs or 0,
            add_special_tokens=self.add_special_tokens,
            chat_template_kwargs=self.chat_template_kwargs or {},
            roles=self.roles,
        )

    def format(self) -> ChatFormat:
        return ChatFormat(has_logprobs=bool(self.logprobs), names_ids=bool(self.return_tokens_as_token_ids))
