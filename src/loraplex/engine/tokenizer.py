"""Text -> token ids, through a contract's template or verbatim. A conversation is tokenized once however many ask."""

import functools
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraplex.classifier import CONVERSATION, QUESTION, Contract, valid_unicode
from loraplex.engine.detokenizer import REPLACEMENT
from loraplex.errors import BundleError, ContractError, InputTooLongError, InvalidRequestError
from loraplex.types import Message

# Endings of a conversation that a label must not merge with (checked when a contract is bound).
_PROBES = ("Customer: hello", "Customer: is it done?", "Agent: Yes.\nCustomer: ok 5")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """num_conversation: leading tokens that the same conversation, grown, will begin with again, as far as is known.
    activation: the first token that the adapter acts on."""

    text: str
    token_ids: tuple[int, ...]
    num_conversation: int
    activation: int = 0
    warnings: tuple[str, ...] = ()


class Tokenizer:
    """A Hugging Face tokenizer, and what of it prompts depend on."""

    def __init__(self, folder: Path, num_embeddings: int = sys.maxsize) -> None:
        """num_embeddings: of the base; a tokenizer may know more tokens, such as a padding token added later."""
        from transformers import AutoTokenizer
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._num_embeddings = num_embeddings

        try:
            self._hf: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as exc:  # a Rust panic or any of a dozen kinds; all mean a broken or unknown tokenizer
            raise BundleError(
                folder, f"the tokenizer does not load: {exc}", remedy="copy the base's tokenizer files again"
            ) from None
        if not self._hf.is_fast:
            raise BundleError(
                folder,
                "the tokenizer has no fast version",
                remedy="convert it: AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )
        self.special_tokens: dict[str, int] = {
            token.content: token_id for token_id, token in self._hf.added_tokens_decoder.items() if token.special
        }
        # A special token cuts text before anything else looks at it, so what precedes it tokenizes alone. One that
        # strips the space on its left reaches over the cut.
        self._cutting = {t.content for t in self._hf.added_tokens_decoder.values() if t.special and not t.lstrip}
        spelled = sorted(self.special_tokens, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spelled))) if spelled else None
        self._byte_of = {char: byte for byte, char in bytes_to_unicode().items()}  # of byte-level tokenizers
        # A token alone: its text, and its bytes, of which a character may have more; None where they are not known.
        self.spell = functools.lru_cache(1 << 16)(self._spell)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Exactly `tokenizer(text)`. InvalidRequestError for a token that the base has no embedding for."""
        ids: list[int] = self._hf(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        self.check(ids)
        return ids

    def check(self, token_ids: Iterable[int]) -> None:
        """InvalidRequestError for a token that the base has no embedding for."""
        wrong = next((one for one in token_ids if not 0 <= one < self._num_embeddings), None)
        if wrong is None:
            return
        spelled = f"the token {self.decode(wrong)!r} ({wrong})" if 0 <= wrong < len(self._hf) else f"the token {wrong}"
        raise InvalidRequestError(
            f"{spelled} is none of the base's {self._num_embeddings} embeddings",
            remedy="leave it out, or serve the base with the tokenizer that it was saved with",
        )

    def offsets(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The character at which each token starts; special tokens that were added start at 0."""
        encoded = self._hf(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in encoded["offset_mapping"]]

    def decode(self, *token_ids: int) -> str:
        text: str = self._hf.decode(list(token_ids))
        return text

    def decode_part(self, token_ids: Seq[int], *, skip_special_tokens: bool) -> str:
        """Of a longer text: the tokens' own characters, spaces as they are."""
        text: str = self._hf.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def _spell(self, token_id: int) -> tuple[str, bytes | None]:
        text = self.decode(token_id)
        if REPLACEMENT not in text:
            return text, text.encode()
        piece: str = self._hf.convert_ids_to_tokens(token_id) or ""
        fallback = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        if fallback is not None:
            return text, bytes.fromhex(fallback[1])
        if piece and all(char in self._byte_of for char in piece):
            return text, bytes(self._byte_of[char] for char in piece)
        return text, None

    def starts_with_cut(self, text: str) -> bool:
        """Whether `text` begins with a special token, so that what stands before it tokenizes alone."""
        return any(text.startswith(token) for token in self._cutting)

    def escape(self, text: str) -> tuple[str, tuple[str, ...]]:
        """Break up special tokens that `text` spells, so that they stay text: a space after their first character.
        Returns the text and what was found."""
        if self._spelled is None:
            return text, ()
        found = tuple(dict.fromkeys(self._spelled.findall(text)))
        if found:
            text = self._spelled.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
            while self._spelled.search(text):  # a token that a space does not break, or that one makes: take it out
                text = self._spelled.sub("", text)
        return text, found

    def chat_frame(self, content: str, source: object) -> str | None:
        """The base's chat template around one user message, up to where the answer starts; None without a template."""
        if not self._hf.chat_template:
            return None
        try:
            return self._apply_chat_template([{"role": "user", "content": content}], {})
        except Exception as exc:  # jinja's errors and the template's own
            raise ContractError(
                source,
                f"the base's chat template fails: {exc}",
                remedy="give a 'template' in classifier.yaml",
            ) from None

    def chat(self, messages: Seq[Message], options: Mapping[str, bool | int | str]) -> tuple[str, tuple[str, ...]]:
        """The messages in the base's chat template, up to where the answer starts, and what was escaped in them:
        special tokens are the template's only. options: the template's own variables. InvalidRequestError: there is
        no template, or it refuses them."""
        if not self._hf.chat_template:
            raise InvalidRequestError(
                "the base has no chat template",
                remedy="ask an adapter with a contract, or send the whole prompt to /v1/completions",
            )
        # Such as another template, which is no client's to choose.
        reserved = options.keys() & inspect.signature(self._hf.apply_chat_template).parameters.keys()
        if reserved:
            raise InvalidRequestError(
                f"chat_template_kwargs holds {min(reserved)!r}, which is no variable of the template",
                remedy="leave it out",
            )
        spelled: list[str] = []

        def escaped(text: str) -> str:
            text, found = self.escape(valid_unicode(text))
            spelled.extend(found)
            return text

        turns = [{"role": escaped(one.role), "content": escaped(one.content)} for one in messages]
        given = {name: escaped(value) if isinstance(value, str) else value for name, value in options.items()}
        try:
            text = self._apply_chat_template(turns, given)
        except Exception as exc:  # jinja's errors and the template's own
            raise InvalidRequestError(
                f"the base's chat template refuses the messages: {exc}",
                remedy="send the roles, in the order, that it is written for",
            ) from None
        return text, tuple(dict.fromkeys(spelled))

    def _apply_chat_template(self, messages: list[dict[str, str]], options: Mapping[str, Any]) -> str:
        text: str = self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        return text

    def starts_with_bos(self, text: str) -> bool:
        return bool(self._hf.bos_token) and text.startswith(self._hf.bos_token)


class Conversations:
    """The tokens of one call's conversations: the same text is tokenized once however many classifiers ask."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = functools.cache(tokenizer.encode)
        self.offsets = functools.cache(tokenizer.offsets)
        self.escape = functools.cache(tokenizer.escape)


class Template:
    """A contract bound to a tokenizer: fixed text around the conversation, and the labels' tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        contract: Contract,
        max_model_len: int,
        source: object,
        invocation_tokens: tuple[int, ...] | None = None,
        *,
        reads_labels: bool = True,
    ) -> None:
        """source: the contract's file, for errors. reads_labels: the answer is the labels' tokens, and not that of a
        head that knows the labels by number. ContractError where the labels cannot be told apart by tokens, or
        the template does not hold the adapter's `invocation_tokens` behind the conversation."""
        self._tokenizer = tokenizer
        self._roles = tuple(dict.fromkeys(contract.roles.values()))
        self.prefix, self.suffix, self._add_special_tokens = _frame(tokenizer, contract, source)
        self._suffix_ids = self._cut_suffix()
        self.label_ids = {label: self._label_ids(label, source) for label in contract.labels if reads_labels}
        for label, ids in self.label_ids.items():
            for other, other_ids in self.label_ids.items():
                if label != other and other_ids[: len(ids)] == ids:
                    raise ContractError(
                        f"{source}, key 'labels'",
                        f"the tokens of {label!r} {list(ids)} begin those of {other!r} {list(other_ids)}",
                        remedy="choose labels of which none begins another",
                    )
        self._invocation = invocation_tokens
        self._num_active = 0 if invocation_tokens is None else self._find_activation(invocation_tokens, source)
        self._num_suffix = len(tokenizer.encode(self.suffix, add_special_tokens=False))
        continuation = max(map(len, self.label_ids.values()), default=1) - 1
        limit = max_model_len if contract.max_length is None else contract.max_length
        if limit > max_model_len:
            raise ContractError(
                f"{source}, key 'max_length'",
                f"{limit} is more than the base's {max_model_len}",
                remedy=f"at most {max_model_len}",
            )
        self.max_length = limit
        self._room = min(limit, max_model_len - continuation)
        self._num_fixed = len(tokenizer.encode(self.render(""), add_special_tokens=self._add_special_tokens))
        if self._num_fixed >= self._room:
            raise ContractError(
                f"{source}, key 'template'",
                f"without a conversation it takes {self._num_fixed} tokens of {self._room}",
                remedy="shorten the template or raise 'max_length'",
            )

    def render(self, conversation: str) -> str:
        return self.prefix + conversation + self.suffix

    def prompt(self, conversation: str, conversations: Conversations) -> Prompt:
        """The prompt for `conversation`, its oldest turns cut where it is too long."""
        warnings = []
        conversation, spelled = conversations.escape(conversation)
        if spelled:
            warnings.append(_kept_as_text(spelled))
        ids = self._encode(conversation, conversations)
        if len(ids) > self._room:
            num_tokens = len(ids)
            conversation, ids = self._truncate(conversation, num_tokens, conversations)
            warnings.append(
                f"the prompt has {num_tokens} tokens, {self._room} at most; the oldest turns were cut: {len(ids)}"
            )
        return Prompt(
            text=self.render(conversation),
            token_ids=tuple(ids),
            num_conversation=len(ids) - self._num_suffix,
            activation=self._activation(ids),
            warnings=tuple(warnings),
        )

    def _encode(self, conversation: str, conversations: Conversations) -> list[int]:
        if self._suffix_ids is not None:
            head = conversations.encode(self.prefix + conversation, add_special_tokens=self._add_special_tokens)
            return head + self._suffix_ids
        return conversations.encode(self.render(conversation), add_special_tokens=self._add_special_tokens)

    def _truncate(self, conversation: str, num_tokens: int, conversations: Conversations) -> tuple[str, list[int]]:
        """Cut from the left at a multiple of a quarter of what the template leaves, moved on to the next turn where one
        starts within another quarter: as the conversation grows the cut moves rarely, so that its start, and what is
        cached of it, stays put, and at least half of the room stays used."""
        head = len(self.prefix)
        offsets = conversations.offsets(self.prefix + conversation, add_special_tokens=self._add_special_tokens)
        starts = [offset - head for offset in offsets if offset >= head]  # character of each conversation token
        turns = turn_starts(conversation, self._roles)
        step = max(1, (self._room - self._num_fixed) // 4)
        first = -(-(num_tokens - self._room) // step) * step  # in tokens
        for cut in range(first, len(starts), step):
            soon = starts[min(cut + step, len(starts) - 1)]
            at = next((turn for turn in turns if starts[cut] <= turn <= soon), starts[cut])
            ids = self._encode(conversation[at:], conversations)
            if len(ids) <= self._room:
                return conversation[at:], ids
        raise InputTooLongError(
            f"the prompt has {num_tokens} tokens, {self._room} at most, and its end does not fit alone",
            remedy="raise 'max_length' in classifier.yaml, or shorten the input",
        )

    def _activation(self, ids: Seq[int]) -> int:
        """Where the template says, whatever the conversation holds."""
        if self._invocation is None:
            return 0
        activation = last_match(ids, self._invocation)
        if activation != len(ids) - self._num_active:
            raise InvalidRequestError(
                "the conversation's end merges with the template's invocation tokens",
                remedy="begin the template's text behind the conversation with a special token or a line break",
            )
        return activation

    def _find_activation(self, invocation: tuple[int, ...], source: object) -> int:
        """Tokens from the invocation to the prompt's end, which must not depend on the conversation."""
        found = set()
        for probe in _PROBES:
            ids = self._tokenizer.encode(self.render(probe), add_special_tokens=self._add_special_tokens)
            at = last_match(ids, invocation)
            found.add(None if at is None else len(ids) - at)
        [distance] = found if len(found) == 1 else [None]
        if distance is None:
            spelled = "".join(map(self._tokenizer.decode, invocation))
            raise ContractError(
                f"{source}, key 'template'",
                f"lacks the adapter's invocation tokens {list(invocation)} ({spelled!r}) behind the conversation",
                remedy="put their text behind {conversation}, as in the adapter's training",
            )
        return distance

    def _cut_suffix(self) -> list[int] | None:
        """The suffix's own tokens where it begins with a special token, else None: it may merge with what precedes."""
        if not self._tokenizer.starts_with_cut(self.suffix):
            return None
        add = self._add_special_tokens
        suffixes = []
        for probe in _PROBES:
            head = self._tokenizer.encode(self.prefix + probe, add_special_tokens=add)
            whole = self._tokenizer.encode(self.render(probe), add_special_tokens=add)
            if whole[: len(head)] != head:
                return None
            suffixes.append(whole[len(head) :])
        return suffixes[0] if all(suffix == suffixes[0] for suffix in suffixes) else None

    def _label_ids(self, label: str, source: object) -> tuple[int, ...]:
        """Tokens of rendered + label minus those of rendered."""
        found = set()
        for probe in _PROBES:
            rendered = self.render(probe)
            ids = self._tokenizer.encode(rendered, add_special_tokens=self._add_special_tokens)
            whole = self._tokenizer.encode(rendered + label, add_special_tokens=self._add_special_tokens)
            if whole[: len(ids)] != ids or len(whole) == len(ids):
                raise ContractError(
                    f"{source}, key 'labels'",
                    f"the label {label!r} merges with the end of the prompt {rendered[-20:]!r} when they are tokenized",
                    remedy="end the template with a special token or a line break, or begin the labels with a space",
                )
            found.add(tuple(whole[len(ids) :]))
        if len(found) > 1:
            raise ContractError(
                f"{source}, key 'labels'",
                f"the tokens of {label!r} depend on how the conversation ends: {sorted(found)}",
                remedy="end the template with a special token or a line break",
            )
        return found.pop()


def last_match(ids: Seq[int], wanted: Seq[int]) -> int | None:
    """Where `wanted` begins in `ids` for the last time."""
    ids, wanted = tuple(ids), tuple(wanted)
    for at in range(len(ids) - len(wanted), -1, -1):
        if ids[at] == wanted[0] and ids[at : at + len(wanted)] == wanted:
            return at
    return None


def verbatim(
    text: str,
    tokenizer: Tokenizer,
    max_model_len: int,
    invocation_tokens: tuple[int, ...] | None = None,
    *,
    add_special_tokens: bool = True,
) -> Prompt:
    """The article's prompt: `tokenizer(text)`, special tokens parsed. InputTooLongError: never cut.
    InvalidRequestError where it lacks the adapter's invocation tokens: PEFT would answer from the base."""
    ids = tokenizer.encode(valid_unicode(text), add_special_tokens=add_special_tokens) if text else []
    return _prompt_of(ids, text, tokenizer, max_model_len, invocation_tokens)


def tokenized(
    token_ids: Seq[int], tokenizer: Tokenizer, max_model_len: int, invocation_tokens: tuple[int, ...] | None = None
) -> Prompt:
    """A prompt that the client tokenized. Errors as `verbatim`, and InvalidRequestError for what is no token."""
    tokenizer.check(token_ids)
    return _prompt_of(token_ids, "", tokenizer, max_model_len, invocation_tokens)


def chat(
    messages: Seq[Message],
    options: Mapping[str, bool | int | str],
    tokenizer: Tokenizer,
    max_model_len: int,
    invocation_tokens: tuple[int, ...] | None = None,
) -> Prompt:
    """Messages in the base's chat template, see `Tokenizer.chat`. InputTooLongError: never cut."""
    text, spelled = tokenizer.chat(messages, options)
    ids = tokenizer.encode(text, add_special_tokens=False)  # the template writes its own
    prompt = _prompt_of(ids, text, tokenizer, max_model_len, invocation_tokens)
    return replace(prompt, warnings=(_kept_as_text(spelled),)) if spelled else prompt


def _kept_as_text(spelled: Seq[str]) -> str:
    return f"the input spells special tokens, which were kept as text: {', '.join(map(repr, spelled))}"


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
            remedy=f"write {''.join(map(tokenizer.decode, invocation))!r} where the adapter shall begin to act",
        )
    return Prompt(text=text, token_ids=tuple(ids), num_conversation=len(ids), activation=activation)


def turn_starts(conversation: str, names: tuple[str, ...]) -> list[int]:
    """Characters at which a line begins with a role's name and a colon; any line where no line does; never 0."""
    speakers = "|".join(map(re.escape, names))
    starts = [match.end() for match in re.finditer(rf"\n(?=(?:{speakers}):)", conversation)]
    return starts or [match.end() for match in re.finditer(r"\n(?=.)", conversation)]


def _frame(tokenizer: Tokenizer, contract: Contract, source: object) -> tuple[str, str, bool]:
    """Text before and after the conversation, and whether the tokenizer adds its special tokens to it."""
    template, add_special_tokens = contract.template, True
    if template is None:
        content = f"{CONVERSATION}\n{QUESTION}" if contract.question is not None else CONVERSATION
        frame = tokenizer.chat_frame(content, source)
        template = content + "\n" if frame is None else frame
        if CONVERSATION not in template:
            raise ContractError(
                source,
                "the base's chat template leaves the user's message out",
                remedy="give a 'template' in classifier.yaml",
            )
        add_special_tokens = frame is None  # a chat template writes its own
    if tokenizer.starts_with_bos(template):
        add_special_tokens = False  # or there would be two
    prefix, _, suffix = template.partition(CONVERSATION)
    question = contract.question or ""
    return prefix.replace(QUESTION, question), suffix.replace(QUESTION, question), add_special_tokens
