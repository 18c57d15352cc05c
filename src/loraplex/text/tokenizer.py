"""A base's tokenizer: text -> token ids and back, and its chat template."""

import functools
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from loraplex.classifier import valid_unicode
from loraplex.errors import BundleError, ContractError, InvalidRequestError
from loraplex.text.detokenizer import REPLACEMENT
from loraplex.types import Message


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
