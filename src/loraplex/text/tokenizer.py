"""A tokenizer: text to token ids and back."""

import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from loraplex.classifier import conversation_text, normalized
from loraplex.errors import BundleError, InvalidRequestError, quoted
from loraplex.text.detokenizer import REPLACEMENT
from loraplex.types import Message, Owner, Roles


class Tokenizer:
    """A Hugging Face tokenizer, and the properties of it that prompts depend on."""

    def __init__(self, folder: Path, num_embeddings: int = sys.maxsize, owner: Owner = "base") -> None:
        """num_embeddings: of the base. A tokenizer may know more tokens, such as a padding token added later. Raises
        BundleError where the tokenizer does not load or has no fast version."""
        from transformers import AutoTokenizer
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self.folder, self.num_embeddings, self.owner = folder, num_embeddings, owner
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
        self._hf.backend_tokenizer.no_truncation()  # what a saved file says; calls say what they want
        self._hf.backend_tokenizer.no_padding()
        added = self._hf.added_tokens_decoder
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.pad_token_id: int | None = self._hf.pad_token_id
        self.eos_token_id: int | None = self._hf.eos_token_id
        special = [token for token in added.values() if token.special]
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
        wrong = next((one for one in token_ids if not 0 <= one < self.num_embeddings), None)
        if wrong is None:
            return
        spelled = (
            f"the token {self.decode(wrong)!r} ({wrong})"
            if 0 <= wrong < len(self._hf)
            else f"the token {quoted(wrong)}"
        )
        raise InvalidRequestError(
            f"{spelled} has no embedding in the base, which has {self.num_embeddings} embeddings",
            remedy="leave it out, or serve the base with the tokenizer that it was saved with",
        )

    def offsets(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the character at which each token starts; added special tokens start at 0."""
        encoded = self._hf(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in encoded["offset_mapping"]]

    def pieces(self, token_ids: Seq[int]) -> list[str]:
        """Return each token as the vocabulary writes it."""
        pieces: list[str] = self._hf.convert_ids_to_tokens(list(token_ids))
        return pieces

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

    def last_cut(self, text: str) -> int:
        """Return where the last special token in `text` begins, so that text before it tokenizes alone; 0 without."""
        at = 0
        for token in self._cutting:  # a base may have hundreds; only what lies behind the last one found is searched
            at = max(at, text.rfind(token, at))
        return at

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

    @property
    def chat_template(self) -> str | None:
        """The template in the tokenizer's own files. Of several it is the default one; None where there is none."""
        try:
            text: str = self._hf.get_chat_template()
        except ValueError:  # no template, or several of which none is the default
            return None
        return text

    def apply_chat_template(
        self, messages: list[dict[str, Any]], template: str | None, options: Mapping[str, Any]
    ) -> str:
        """Return the messages in `template`, up to where the answer starts. Raises whatever the template raises."""
        text: str = self._hf.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **options
        )
        return text

    @property
    def template_arguments(self) -> frozenset[str]:
        """The names that `apply_chat_template` takes for itself and does not pass on to the template."""
        return frozenset(inspect.signature(self._hf.apply_chat_template).parameters)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        vocabulary: dict[str, int] = self._hf.get_vocab()
        return vocabulary

    @functools.cached_property
    def rules(self) -> str:
        """A hash of all that decides how text becomes tokens, and of what chat templates know of a tokenizer. With the
        same rules, tokenizers work alike."""
        rules = f"{self._hf.backend_tokenizer.to_str()} {self._hf.bos_token} {self._hf.eos_token}"
        return hashlib.sha256(rules.encode()).hexdigest()

    def starts_with_bos(self, text: str) -> bool:
        return bool(self._hf.bos_token) and text.startswith(self._hf.bos_token)


class Conversations:
    """Caches one call's conversations: each text is made once, and tokenized once by each tokenizer, however many
    classifiers ask."""

    def __init__(self) -> None:
        self.normalized = functools.cache(normalized)
        self.encode = functools.cache(Tokenizer.encode)
        self.offsets = functools.cache(Tokenizer.offsets)
        self.escape = functools.cache(Tokenizer.escape)
        self.render = functools.cache(lambda chat, messages: chat.render(messages))
        self._text = functools.cache(lambda conversation, roles: conversation_text(conversation, dict(roles)))

    def text(self, conversation: str | tuple[Message, ...], roles: Roles) -> str:
        """Return `conversation_text`, which is made once for all classifiers with the same roles."""
        text: str = self._text(conversation, tuple(roles.items()))
        return text
