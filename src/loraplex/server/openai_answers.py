"""Answers of the OpenAI HTTP routes, whole or in chunks, and how they are built from generated tokens."""

from collections.abc import Sequence as Seq
from typing import Any, Literal, overload

from pydantic import BaseModel

from loraplex.generation import GeneratedToken, GenerateResult, LikelyToken, PromptToken

LOWEST = -9999.0  # replaces lower log probabilities, because JSON has no -inf

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class Answer(BaseModel):
    """Fields that all answers and chunks share. A field that is not set is left out.

    system_fingerprint:  the adapter's version.
    usage:               in a stream only if the client asked for it: null in every chunk but the last, or in each chunk
                         the usage of its choice so far.
    warnings:            a field of Loraplex: what in the prompt was not taken as it was given.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str | None = None
    usage: CompletionUsage | None = None
    warnings: list[str] | None = None


class CompletionLogprobs(BaseModel):
    """One entry for each token. The first token of a prompt (`echo`) has no log probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Answer):
    """An answer of /v1/completions, or one chunk of it."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatAnswer(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Answer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class CompletionFormat:
    """How /v1/completions builds its answers. `head` holds the fields of Answer."""

    id_prefix = "cmpl"

    def __init__(self, *, has_logprobs: bool, names_ids: bool) -> None:
        self._has_logprobs, self._names_ids = has_logprobs, names_ids

    def answer(self, results: Seq[GenerateResult], **head: Any) -> Completion:
        """Return the whole answer."""
        choices = [
            CompletionChoice(
                index=index,
                text=one.prompt_text + one.text,
                logprobs=self._logprobs(one.tokens, one.prompt_tokens, len(one.prompt_text)),
                finish_reason=one.finish_reason,
            )
            for index, one in enumerate(results)
        ]
        return Completion(object="text_completion", choices=choices, **head)

    def first(self, index: int, **head: Any) -> None:
        """Return the chunk that begins a choice, or None if the format has no such chunk."""
        return None

    def chunk(self, index: int, token: GeneratedToken, text: str, **head: Any) -> Completion | None:
        """Return the chunk for a token and the text that became final with it, or None if the chunk would be empty."""
        if not text and not self._has_logprobs:
            return None
        choice = CompletionChoice(index=index, text=text, logprobs=self._logprobs([token]), finish_reason=None)
        return Completion(object="text_completion", choices=[choice], **head)

    def last(self, index: int, result: GenerateResult, **head: Any) -> Completion:
        """Return the chunk that ends a choice."""
        choice = CompletionChoice(index=index, text="", logprobs=None, finish_reason=result.finish_reason)
        return Completion(object="text_completion", choices=[choice], **head)

    def empty(self, **head: Any) -> Completion:
        """Return a chunk without a choice."""
        return Completion(object="text_completion", choices=[], **head)

    def _logprobs(
        self, tokens: Seq[GeneratedToken], prompt: Seq[PromptToken] = (), num_chars: int = 0
    ) -> CompletionLogprobs | None:
        """num_chars: of the prompt, if the answer's text begins with it."""
        if not self._has_logprobs:
            return None
        every: list[GeneratedToken | PromptToken] = [*prompt, *tokens]
        return CompletionLogprobs(
            tokens=[_name(token, self._names_ids) for token in every],
            token_logprobs=[_log_prob(token.log_prob) for token in every],
            top_logprobs=[self._top(token) for token in every],
            text_offset=[token.offset for token in prompt] + [num_chars + token.offset for token in tokens],
        )

    def _top(self, token: GeneratedToken | PromptToken) -> dict[str, float] | None:
        """Return spelling -> log probability, for the likeliest tokens and the token itself. If several are spelled
        alike, such as parts of characters, the likeliest counts."""
        if token.log_prob is None:
            return None
        top: dict[str, float] = {}
        for one in token.top:
            top.setdefault(_name(one, self._names_ids), _log_prob(one.log_prob))
        top.setdefault(_name(token, self._names_ids), _log_prob(token.log_prob))
        return top


class ChatFormat:
    """How /v1/chat/completions builds its answers; the methods are those of CompletionFormat."""

    id_prefix = "chatcmpl"

    def __init__(self, *, has_logprobs: bool, names_ids: bool) -> None:
        self._has_logprobs, self._names_ids = has_logprobs, names_ids

    def answer(self, results: Seq[GenerateResult], **head: Any) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=ChatAnswer(role="assistant", content=one.text, refusal=None),
                logprobs=self._logprobs(one.tokens),
                finish_reason=one.finish_reason,
            )
            for index, one in enumerate(results)
        ]
        return ChatCompletion(object="chat.completion", choices=choices, **head)

    def first(self, index: int, **head: Any) -> ChatCompletionChunk:
        return _chat_chunk(index, ChatDelta(role="assistant", content=""), **head)

    def chunk(self, index: int, token: GeneratedToken, text: str, **head: Any) -> ChatCompletionChunk | None:
        if not text and not self._has_logprobs:
            return None
        return _chat_chunk(index, ChatDelta(content=text), self._logprobs([token]), **head)

    def last(self, index: int, result: GenerateResult, **head: Any) -> ChatCompletionChunk:
        return _chat_chunk(index, ChatDelta(), finish_reason=result.finish_reason, **head)

    def empty(self, **head: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk(object="chat.completion.chunk", choices=[], **head)

    def _logprobs(self, tokens: Seq[GeneratedToken]) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        content = [
            TokenLogprob(**self._spelled(token), top_logprobs=[TopLogprob(**self._spelled(one)) for one in token.top])
            for token in tokens
        ]
        return ChatLogprobs(content=content, refusal=None)

    def _spelled(self, token: LikelyToken) -> dict[str, Any]:
        utf8 = None if token.utf8 is None else list(token.utf8)
        return {"token": _name(token, self._names_ids), "logprob": _log_prob(token.log_prob), "bytes": utf8}


Format = CompletionFormat | ChatFormat


def usage_of(results: Seq[GenerateResult], num_choices: int) -> CompletionUsage:
    """Return the usage of all results. Each prompt counts once.

    num_choices:  choices for each prompt. The choice that found the fewest cached tokens computed the prompt, so its
                  number counts.
    """
    prompts = [results[start : start + num_choices] for start in range(0, len(results), num_choices)]
    num_prompt = sum(choices[0].usage.prompt_tokens for choices in prompts)
    num_generated = sum(len(result.tokens) for result in results)
    num_cached = sum(min(one.usage.cached_tokens for one in choices) for choices in prompts)
    return CompletionUsage(
        prompt_tokens=num_prompt,
        completion_tokens=num_generated,
        total_tokens=num_prompt + num_generated,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
    )


def _chat_chunk(
    index: int,
    delta: ChatDelta,
    logprobs: ChatLogprobs | None = None,
    finish_reason: FinishReason | None = None,
    **head: Any,
) -> ChatCompletionChunk:
    choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
    return ChatCompletionChunk(object="chat.completion.chunk", choices=[choice], **head)


def usage_so_far(num_prompt: int, num_generated: int) -> CompletionUsage:
    """Return the usage of one choice in the middle of a stream."""
    return CompletionUsage(
        prompt_tokens=num_prompt, completion_tokens=num_generated, total_tokens=num_prompt + num_generated
    )


def _name(token: LikelyToken | PromptToken, names_ids: bool) -> str:
    return f"token_id:{token.id}" if names_ids else token.text


@overload
def _log_prob(log_prob: float) -> float: ...
@overload
def _log_prob(log_prob: None) -> None: ...
def _log_prob(log_prob: float | None) -> float | None:
    return None if log_prob is None else max(log_prob, LOWEST)
