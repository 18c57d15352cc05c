"""Prompts without a contract: verbatim text, token ids, or messages in a chat template."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from loraplex.classifier import valid_unicode
from loraplex.errors import InputTooLongError, InvalidRequestError, listed
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.tokenizer import Tokenizer
from loraplex.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A tokenized prompt.

    num_conversation:  leading tokens that the prompt is expected to begin with again when the conversation has grown.
    activation:        index of the first token that the adapter acts on.
    """

    text: str
    token_ids: tuple[int, ...]
    num_conversation: int
    activation: int = 0
    warnings: tuple[str, ...] = ()


def verbatim(
    text: str,
    tokenizer: Tokenizer,
    max_model_len: int,
    invocation_tokens: tuple[int, ...] | None = None,
    *,
    add_special_tokens: bool = True,
) -> Prompt:
    """Return the article's prompt: `tokenizer(text)`, with special tokens parsed.

    Raises InputTooLongError where the text is too long; it is never cut. Raises InvalidRequestError where the text is
    empty or lacks the adapter's invocation tokens, because PEFT would answer from the base.
    """
    ids = tokenizer.encode(valid_unicode(text), add_special_tokens=add_special_tokens) if text else []
    return _prompt_of(ids, text, tokenizer, max_model_len, invocation_tokens)


def tokenized(
    token_ids: Seq[int], tokenizer: Tokenizer, max_model_len: int, invocation_tokens: tuple[int, ...] | None = None
) -> Prompt:
    """Return the prompt of token ids from the client. Raises the errors of `verbatim`, and InvalidRequestError for an
    id that is not a token of the base."""
    tokenizer.check(token_ids)
    return _prompt_of(token_ids, "", tokenizer, max_model_len, invocation_tokens)


def chat(
    messages: Seq[Message],
    options: Mapping[str, bool | int | str],
    template: ChatTemplate,
    max_model_len: int,
    invocation_tokens: tuple[int, ...] | None = None,
    *,
    add_special_tokens: bool = False,
) -> Prompt:
    """Return the prompt of messages in a chat template. Raises the errors of `verbatim` and `ChatTemplate.chat`."""
    text, spelled = template.chat(messages, options)
    tokenizer = template.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    prompt = _prompt_of(ids, text, tokenizer, max_model_len, invocation_tokens)
    return replace(prompt, warnings=(kept_as_text(spelled),)) if spelled else prompt


def kept_as_text(spelled: Seq[str]) -> str:
    return f"escaped_special_tokens: the input spells special tokens, which were kept as text: {listed(spelled)}"


def _prompt_of(
    ids: Seq[int], text: str, tokenizer: Tokenizer, max_model_len: int, invocation_tokens: tuple[int, ...] | None
) -> Prompt:
    if not ids:
        raise InvalidRequestError("the input is empty", remedy="send the text to classify")
    if len(ids) > max_model_len:
        raise InputTooLongError(
            f"the prompt has {len(ids)} tokens, the base takes {max_model_len}",
            remedy="shorten it, or give the adapter a classifier.yaml, whose template cuts the oldest turns",
        )
    activation = 0 if invocation_tokens is None else last_match(ids, invocation_tokens)
    if activation is None:
        invocation = invocation_tokens or ()
        raise InvalidRequestError(
            f"the prompt lacks the adapter's invocation tokens {list(invocation)}",
            remedy=f"write {''.join(map(tokenizer.decode, invocation))!r} where the adapter should begin to act",
        )
    return Prompt(text=text, token_ids=tuple(ids), num_conversation=len(ids), activation=activation)


def last_match(ids: Seq[int], wanted: Seq[int]) -> int | None:
    """Return where `wanted` begins in `ids` for the last time; None where `ids` lacks it."""
    ids, wanted = tuple(ids), tuple(wanted)
    for at in range(len(ids) - len(wanted), -1, -1):
        if ids[at] == wanted[0] and ids[at : at + len(wanted)] == wanted:
            return at
    return None
