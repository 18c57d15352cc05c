"""Requests for text and their answers: plain frozen data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from loraplex.types import AdapterRef, Message, Roles, Timings, Usage

MAX_TOP = 20  # largest `num_top` of a GenerateRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A prompt to continue under an adapter, or under the bare base where `adapter` is None.

    prompt:        text, token ids or messages. Text is taken verbatim, and its special tokens are parsed. Messages go
                   through the adapter's contract, else the base's chat template; special tokens in them stay text.
    max_tokens:    None: as many as the base's context allows.
    temperature:   0 takes the likeliest token. Above 0, tokens are drawn from the smallest set of likeliest tokens
                   whose probabilities add up to `top_p`.
    seed:          the same seed draws the same tokens.
    min_tokens:    before so many tokens, no end-of-text token and none of `stop_token_ids` is chosen.
    ignore_eos:    whether an end-of-text token is a token like any other.
    stop:          the first of these texts to appear ends the answer, and is not part of it.
    stop_token_ids:  the first of these tokens ends the answer, too.
    echo:          whether the result holds the prompt's text. `max_tokens` may then be 0.
    scores_prompt: whether the result holds the prompt's tokens with their log probabilities.
    num_top:       how many of the likeliest tokens to return with each token, 20 at most.
    logit_bias:    token id -> -100 to 100, added before a token is chosen. Log probabilities do not include it.
    allowed_token_ids:     if not empty, only these tokens are chosen.
    add_special_tokens:    whether the tokenizer adds its special tokens. None: to text only, because a chat template
                           writes them itself.
    skip_special_tokens:   whether the answer's text leaves special tokens out.
    chat_template_kwargs:  variables of the base's chat template.
    conversation_id:       keeps what was computed for the conversation's next turn.
    deadline_ms:           milliseconds from the call.
    roles:                 of messages: roles that differ from the contract's `roles`.
    """

    prompt: str | tuple[int, ...] | tuple[Message, ...]
    adapter: str | None = None
    max_tokens: int | None = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    echo: bool = False
    scores_prompt: bool = False
    num_top: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    add_special_tokens: bool | None = None
    skip_special_tokens: bool = False
    chat_template_kwargs: Mapping[str, bool | int | str] = field(default_factory=dict)
    conversation_id: str | None = None
    deadline_ms: float | None = None
    roles: Roles | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelyToken:
    """A token that the model found likely.

    text:      the token alone, decoded.
    utf8:      the token's bytes, which may be a part of a character; None where they are not known.
    log_prob:  over the whole vocabulary, before the request's parameters change it.
    """

    id: int
    text: str
    utf8: bytes | None
    log_prob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedToken(LikelyToken):
    """A token of the answer.

    offset:  number of characters in the answer before the token.
    top:     the `num_top` likeliest tokens at this position, likeliest first. The token itself may be missing.
    """

    offset: int
    top: tuple[LikelyToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptToken:
    """A token of the prompt.

    log_prob:  after the tokens before it, over the whole vocabulary; None for the first token.
    offset:    number of characters in the prompt before the token.
    top:       the `num_top` likeliest tokens at this position, likeliest first.
    """

    id: int
    text: str
    log_prob: float | None
    offset: int
    top: tuple[LikelyToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """The answer to a GenerateRequest.

    tokens:    all generated tokens, including an end-of-text token or the tokens of a stop text (reason "stop").
    text:      the answer without an end-of-text token or stop text.
    warnings:  which parts of the prompt were not taken as given, as a verdict's warnings.
    prompt_text, prompt_tokens:  empty unless the request has `echo`, or `scores_prompt`.
    """

    id: str
    text: str
    tokens: tuple[GeneratedToken, ...]
    finish_reason: Literal["stop", "length"]
    adapter: AdapterRef | None
    usage: Usage
    timings: Timings
    warnings: tuple[str, ...] = ()
    prompt_text: str = ""
    prompt_tokens: tuple[PromptToken, ...] = ()


# Called with a token and the text that it made final. Text that may begin a stop text, or half a character, waits.
OnToken = Callable[[GeneratedToken, str], None]
