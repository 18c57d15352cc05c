"""Reads the tokenizer and the chat template of an adapter, which trainers save beside it."""

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from loraplex.bundle import ADAPTER_CONFIG, PROMPT_FILES, parse_json
from loraplex.disk import refuse_pointer
from loraplex.errors import AdapterError, BundleError, quoted
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.tokenizer import Tokenizer

VOCABULARY, CONFIG, SPECIAL, ADDED, TEMPLATE = PROMPT_FILES
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")


class AdapterPrompts:
    """Reads the tokenizer and the chat template that adapters' folders hold. Adapters with the same files share one
    object, and those whose tokenizer works as the base's share the base's. Any thread may call."""

    def __init__(self, base: ChatTemplate) -> None:
        self._base = base
        self._lock = threading.Lock()  # two threads that parse the same files would make two objects
        self._read: WeakValueDictionary[str, ChatTemplate] = WeakValueDictionary()  # by the files' hash
        self._tokenizers: WeakValueDictionary[str, Tokenizer] = WeakValueDictionary()  # by their rules

    def read(self, folder: Path) -> ChatTemplate:
        """Return the folder's chat template and tokenizer; the base's where the folder says nothing else. An adapter
        that lies in another's folder, as PEFT saves several, has those of the other if it has none. Raises
        AdapterError where they do not load, or the tokenizer gives tokens of the base other ids."""
        files = _files(folder)
        if not files and (folder.parent / ADAPTER_CONFIG).is_file():  # of a PEFT model with several adapters
            folder = folder.parent
            files = _files(folder)
        if not files:
            return self._base
        for name, content in files.items():
            refuse_pointer(folder / name, content, AdapterError)
            if name.endswith(".json") and name != VOCABULARY:
                _json(folder, files, name)  # so that an error names this file
            if name == TEMPLATE:
                _check_text(folder / name, content)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        key = str(hashes)
        with self._lock:
            known = self._read.get(key)
            if known is None:
                known = self._read[key] = self._parse(folder, files)
            return known

    def _parse(self, folder: Path, files: dict[str, bytes]) -> ChatTemplate:
        base = self._base
        if VOCABULARY in files:
            tokenizer, text = self._tokenizer(folder, files)
        else:
            tokenizer, text = base.tokenizer, _template_of(folder, files)
            self._check_added(folder, files)
        if text in (None, base.text):
            return base if tokenizer is base.tokenizer else ChatTemplate(tokenizer, base.text, base.owner)
        return ChatTemplate(tokenizer, text, "adapter")

    def _tokenizer(self, folder: Path, files: dict[str, bytes]) -> tuple[Tokenizer, str | None]:
        """Return the tokenizer, and its own chat template."""
        base = self._base.tokenizer
        with tempfile.TemporaryDirectory() as copy:  # so that what is loaded is what was hashed, and nothing else
            for name, content in files.items():
                Path(copy, name).write_bytes(content)
            if CONFIG not in files:
                with suppress(OSError):  # the base may have none, too
                    shutil.copy(base.folder / CONFIG, copy)
            try:
                own = Tokenizer(Path(copy), base.num_embeddings, "adapter")
            except BundleError as exc:
                raise AdapterError(
                    folder / VOCABULARY,
                    exc.message.removeprefix(f"{copy}: "),
                    remedy="save the adapter's tokenizer again; remove its files to use the base's",
                ) from None
        own.folder = folder
        _check_ids(folder / VOCABULARY, own, base)
        if own.rules == base.rules:
            return base, own.chat_template
        return self._tokenizers.setdefault(own.rules, own), own.chat_template

    def _check_added(self, folder: Path, files: dict[str, bytes]) -> None:
        """Raise AdapterError where the files name tokens that the base's tokenizer does not know: without a
        tokenizer.json nothing says how such a tokenizer works."""
        added: dict[str, Any] = _json(folder, files, ADDED)
        config = _json(folder, files, CONFIG)
        decoder = config.get("added_tokens_decoder")
        for token_id, token in decoder.items() if isinstance(decoder, dict) else ():
            added[_content(token)] = token_id
        known, padding = self._base.tokenizer.vocabulary, set()
        for special in (config, _json(folder, files, SPECIAL)):
            for key, token in _special_tokens(special):
                added.setdefault(token, known.get(token, "new"))
                padding |= {token} if key == "pad_token" else set()  # no prompt here holds it
        for token, token_id in added.items():
            if str(known.get(token)) != str(token_id) and token not in padding:
                raise AdapterError(
                    folder,
                    f"its tokenizer has the token {quoted(token)} ({quoted(token_id)}), which the base's has not, and "
                    f"there is no {VOCABULARY}",
                    remedy="save the tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained(…)",
                )


def _files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in PROMPT_FILES if (folder / name).is_file()}


def _json(folder: Path, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return the object in a file that was read; none where the folder lacks the file."""
    return parse_json(folder / name, files.get(name, b"{}"), AdapterError)


def _check_text(path: Path, content: bytes) -> None:
    try:
        content.decode()
    except UnicodeDecodeError as exc:
        raise AdapterError(path, f"is not UTF-8: {exc}", remedy="save or copy the template again") from None


def _content(token: object) -> str:
    """Return a token's text, which files write alone or with the token's properties."""
    return str(token.get("content") if isinstance(token, dict) else token)


def _special_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, token) for each special token that a tokenizer's config names."""
    for key, value in config.items():
        if key in SPECIAL_LISTS and isinstance(value, list | dict):
            yield from ((key, _content(one)) for one in (value.values() if isinstance(value, dict) else value))
        elif key.endswith("_token") and isinstance(value, str | dict):
            yield key, _content(value)


def _check_ids(path: Path, own: Tokenizer, base: Tokenizer) -> None:
    """Raise AdapterError where a token of the base has another id, or a new token has no embedding. Trainers rename
    special tokens that a base has in reserve; no prompt here holds a padding token."""
    remedy = "this tokenizer belongs to another base; remove the tokenizer's files if the base's was used in training"
    known = base.vocabulary
    tokens = {token_id: token for token, token_id in known.items()}
    for token, token_id in own.vocabulary.items():
        there = tokens.get(token_id)
        if there is None and token_id >= base.num_embeddings and token_id != own.pad_token_id:
            raise AdapterError(
                path,
                f"the token {quoted(token)} ({token_id}) has no embedding in the base, which has {base.num_embeddings}",
                remedy="add tokens within the base's embedding, or serve the base that was resized for them",
            )
        is_renamed = token_id in base.special_ids and token not in known
        if there not in (None, token) and not is_renamed:
            raise AdapterError(
                path,
                f"the token {token_id} is {quoted(token)}, and {quoted(there)} in the base's tokenizer",
                remedy=remedy,
            )


def _template_of(folder: Path, files: dict[str, bytes]) -> str | None:
    """Return the chat template of a folder without a tokenizer.json."""
    if TEMPLATE in files:
        return files[TEMPLATE].decode()
    found = _json(folder, files, CONFIG).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [one for one in found if isinstance(one, dict)]
        found = next((one.get("template") for one in named if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None
