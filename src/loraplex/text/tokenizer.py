"""A base's tokenizer: text to token ids and back, and the chat template."""

import functools
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from loraplex.classifier import conversation_text, normalized, valid_unicode
from loraplex.errors import BundleError, ContractError, InvalidRequestError, quoted, shortened
from loraplex.text.detokenizer import REPLACEMENT
from loraplex.types import Message


class Tokenizer:
    """A Hugging Face tokenizer, and the properties of it that prompts depend on."""

    def __init__(self, folder: Path, num_embeddings: int = sys.maxsize) -> None:
        """num_embeddings: of the base. A tokenizer may know more tokens, such as a padding token added later. Raises
        BundleError where the tokenizer does not load or has no fast version."""
        from transformers import AutoTokenizer
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._num_embeddings = num_embeddings

        try:
            self._hf: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as exc:  # a Rust panic or many other kinds: the tokenizer is broken or unknown
            raise BundleError(
                folder, f"the tokenizer does not load: {exc}", remedy="copy the base's tokenizer files again"
            ) from None
        if not self._hf.is_fast:
            raise BundleError(
                folder,
                "the tokenizer has no fast version",
                remedy="convert it: AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )
        special = [token for token in self._hf.added_tokens_decoder.values() if token.special]
        # Special tokens cut the text first, so the text before one tokenizes alone. A special token that strips the
        # space on its left (lstrip) reaches over the cut.
        self._cutting = {token.content for token in special if not token.lstrip}
        spelled = sorted((token.content for token in special), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spelled))) if spelled else None
        self._byte_of = {char: byte for byte, char in bytes_to_unicode().items()}  # for byte-level tokenizers
        # The text and the bytes of one token. The bytes may be part of a character; they are None if unknown.
        self.spell = functools.lru_cache(1 << 16)(self._spell)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return exactly `tokenizer(text)`. Raises InvalidRequestError for a token without an embedding in the base."""
        ids: list[int] = self._hf(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        self.check(ids)
        return ids

    def check(self, token_ids: Iterable[int]) -> None:
        """Raises InvalidRequestError for a token without an embedding in the base."""
        wrong = next((one for one in token_ids if not 0 <= one < self._num_embeddings), None)
        if wrong is None:
            return
        spelled = (
            f"the token {self.decode(wrong)!r} ({wrong})"
            if 0 <= wrong < len(self._hf)
            else f"the token {quoted(wrong)}"
        )
        raise InvalidRequestError(
            f"{spelled} has no embedding in the base, which has {self._num_embeddings} embeddings",
            remedy="leave it out, or serve the base with the tokenizer that it was saved with",
        )

    def offsets(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the character at which each token starts; added special tokens start at 0."""
        encoded = self._hf(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in encoded["offset_mapping"]]

    def decode(self, *token_ids: int) -> str:
        text: str = self._hf.decode(list(token_ids))
        return text

    def decode_part(self, token_ids: Seq[int], *, skip_special_tokens: bool) -> str:
        """Decode part of a longer text: the tokens' own characters, with spaces unchanged."""
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
        """Whether `text` begins with a special token, so that text before it tokenizes alone."""
        return any(text.startswith(token) for token in self._cutting)

    def escape(self, text: str) -> tuple[str, tuple[str, ...]]:
        """Break up special tokens that `text` spells by a space after their first character, so that they stay text.
        Return the text and the special tokens found."""
        if self._spelled is None:
            return text, ()
        found = tuple(dict.fromkeys(self._spelled.findall(text)))
        if found:
            text = self._spelled.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
            while self._spelled.search(text):  # a space does not break this token, or creates it: remove it
                text = self._spelled.sub("", text)
        return text, found

    def chat_frame(self, content: str, source: object) -> str | None:
        """Return the base's chat template around one user message, up to where the answer starts; None without a
        template. Raises ContractError where the template fails."""
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
        """Return the messages in the base's chat template, up to where the answer starts, and the special tokens that
        were escaped in the messages: only the template may write special tokens. options: the template's own variables.
        Raises InvalidRequestError where there is no template, or the template refuses the messages or options."""
        if not self._hf.chat_template:
            raise InvalidRequestError(
                "the base has no chat template",
                remedy="ask an adapter with a contract, or send the whole prompt to /v1/completions",
            )
        # transformers' own arguments, such as another template, which a client must not choose.
        reserved = options.keys() & inspect.signature(self._hf.apply_chat_template).parameters.keys()
        if reserved:
            raise InvalidRequestError(
                f"chat_template_kwargs holds {min(reserved)!r}, which is not a variable of the template",
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
                f"the base's chat template refuses the messages: {shortened(str(exc))}",
                remedy="send the roles, in the order, that it is written for",
            ) from None
        return text, tuple(dict.fromkeys(spelled))

    def _apply_chat_template(self, messages: list[dict[str, str]], options: Mapping[str, Any]) -> str:
        text: str = self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        return text

    def starts_with_bos(self, text: str) -> bool:
        return bool(self._hf.bos_token) and text.startswith(self._hf.bos_token)


class Conversations:
    """Caches the tokens of one call's conversations: each text is tokenized once, however many classifiers ask."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.normalized = functools.cache(normalized)
        self._text = functools.cache(lambda conversation, roles: conversation_text(conversation, dict(roles)))
        self.encode = functools.cache(tokenizer.encode)
        self.offsets = functools.cache(tokenizer.offsets)
        self.escape = functools.cache(tokenizer.escape)

    def text(self, conversation: str | tuple[Message, ...], roles: Mapping[str, str]) -> str:
        """Return `conversation_text`, which is made once for all classifiers with the same roles."""
        text: str = self._text(conversation, tuple(roles.items()))
        return text
