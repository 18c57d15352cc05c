"""Reads conversations with labels: a JSON object on each line of a .jsonl or .jsonl.gz file."""

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loraplex.errors import ConfigurationError, InvalidRequestError, listed, quoted
from loraplex.messages import conversation_of
from loraplex.types import Message

Label = bool | str | Mapping[str, float]  # yes or no, a label's name, or a share for each label
TEXTS = ("conversation", "text", "messages")  # one of these keys holds the conversation
EXPORTED = "ids"  # of requests: only rows of `loraplex routes export` have this key
ITEM = "item"  # does so in mellea's files; beside one of the others it may mean anything
YES_NO = (("yes", "no"), ("true", "false"))  # what true and false stand for, where a contract has such labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A conversation, and what is known about it.

    line:    its line in the file, from 1.
    labels:  classifier -> label. May be empty, and may name classifiers that nobody asks.
    is_exported:  whether `loraplex routes export` wrote it, so that a server keeps it for a bounded time.
    """

    line: int
    input: str | tuple[Message, ...]
    labels: Mapping[str, Label]
    is_exported: bool = False


def read_labelled(
    path: Path, contracts: Mapping[str, Sequence[str]] = MappingProxyType({}), classifier: str | None = None
) -> tuple[Labelled, ...]:
    """Return the conversations of a file, in order. Empty lines are left out.

    contracts:   classifier -> its contract's labels. Labels for these classifiers must be among them.
    classifier:  the one that a line's `label` is for, where the line has no `labels`.
    Raises ConfigurationError, which names all lines that cannot be read, or says that there are none.
    """
    found: list[Labelled] = []
    wrong: dict[str, list[int]] = {}  # what is wrong -> lines
    for number, line in _lines(path):
        try:
            row = _row(number, line, classifier)
            for name, labels in contracts.items():
                if name in row.labels:
                    hard_label(row.labels[name], labels, name)
        except _Wrong as exc:
            wrong.setdefault(str(exc), []).append(number)
        else:
            found.append(row)
    refuse_lines(path, wrong)
    if not found:
        raise ConfigurationError(path, "holds no conversations", remedy=f'write lines such as {{"{TEXTS[1]}": "…"}}')
    return tuple(found)


def refuse_lines(path: Path, wrong: Mapping[str, Sequence[int]]) -> None:
    """Raise ConfigurationError where there is anything wrong. wrong: what is wrong -> the numbers of its lines."""
    if wrong:
        told = "; ".join(f"{numbers(lines)}: {what}" for what, lines in wrong.items())
        raise ConfigurationError(path, told, remedy="correct these lines, or remove them")


def hard_label(label: Label, labels: Sequence[str], name: str = "") -> str:
    """Return the one of a contract's labels that `label` means; of several shares, the one with the largest.

    name:  the classifier's, for the error. Raises ValueError where none of the labels is meant."""
    if isinstance(label, bool):
        return _yes_no(labels, name)[0 if label else 1]
    given = [label] if isinstance(label, str) else list(label)
    for one in given:
        if one not in labels:
            raise _Wrong(f"label {quoted(one)} of {quoted(name)} is not among the contract's: {listed(labels)}")
    return label if isinstance(label, str) else max(label, key=lambda one: label[one])


def label_shares(label: Label, labels: Sequence[str], name: str) -> Mapping[int, float]:
    """Return label's index -> share, of the contract's labels. Raises ValueError as `hard_label` does."""
    if isinstance(label, Mapping):
        hard_label(label, labels, name)  # names what is not among the labels
        total = sum(label.values())
        return {labels.index(one): share / total for one, share in label.items() if share > 0}
    return {labels.index(hard_label(label, labels, name)): 1.0}


def conversation_id(row: Labelled) -> str:
    """Identify a conversation by its words: the same one twice must not lie on both sides of a split."""
    return hashlib.sha256(" ".join(said_in(row).split()).casefold().encode()).hexdigest()


def said_in(row: Labelled) -> str:
    """Return the conversation as text, with a line for each message."""
    return row.input if isinstance(row.input, str) else "\n".join(f"{one.role}: {one.content}" for one in row.input)


def _yes_no(labels: Sequence[str], name: str) -> tuple[str, str]:
    plain = {label.strip().casefold(): label for label in labels}
    for yes, no in YES_NO:
        if yes in plain and no in plain:
            return plain[yes], plain[no]
    raise _Wrong(f"{quoted(name)} has true or false, but the contract's labels are {listed(labels)}: name one of them")


class _Wrong(ValueError):
    """What is wrong with a line."""


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as exc:
        raise ConfigurationError(
            path, f"cannot be read: {exc}", remedy="give a .jsonl file, or a .jsonl.gz that is whole"
        ) from None


def _row(number: int, line: bytes, classifier: str | None) -> Labelled:
    try:
        row: Any = json.loads(line.decode())
    except UnicodeDecodeError:
        raise _Wrong("is not UTF-8") from None
    except (ValueError, RecursionError):
        raise _Wrong("is not JSON") from None
    if not isinstance(row, dict):
        raise _Wrong(f"is a {type(row).__name__}, not an object")
    given = [key for key in TEXTS if key in row] or [key for key in (ITEM,) if key in row]
    if len(given) != 1:
        raise _Wrong(f"has {listed(given) if given else 'no text'}: give one of {listed((*TEXTS, ITEM))}")
    labels = row.get("labels", {})
    if classifier is not None and "labels" not in row and "label" in row:
        labels = {classifier: row["label"]}
    return Labelled(
        line=number, input=_input(given[0], row[given[0]]), labels=_labels(labels), is_exported=EXPORTED in row
    )


def _input(key: str, value: Any) -> str | tuple[Message, ...]:
    if not isinstance(value, list if key == "messages" else str):
        raise _Wrong(f"{quoted(key)} is a {type(value).__name__}, not {'a list' if key == 'messages' else 'text'}")
    try:
        found = conversation_of(value)
    except InvalidRequestError as exc:
        raise _Wrong(exc.message.replace("input", key, 1)) from None
    if not (found.strip() if isinstance(found, str) else found):
        raise _Wrong(f"{quoted(key)} is empty")
    return found


def _labels(given: Any) -> Mapping[str, Label]:
    if not isinstance(given, dict):
        raise _Wrong(f"'labels' is a {type(given).__name__}, not an object")
    found = {name: label for name, label in given.items() if label is not None}  # null: nobody knows
    for name, label in found.items():
        is_share = isinstance(label, dict) and _are_shares(label.values())
        if not (isinstance(label, bool) or (isinstance(label, str) and label) or is_share):
            raise _Wrong(f"the label of {quoted(name)} is no label: give true, false, a name, or shares that sum to 1")
    return MappingProxyType(found)


def _are_shares(shares: Any) -> bool:
    numbers = [one for one in shares if isinstance(one, int | float) and not isinstance(one, bool) and one >= 0]
    return len(numbers) == len(shares) and math.isclose(sum(numbers), 1, abs_tol=0.01)


def numbers(lines: Sequence[int]) -> str:
    """Return line numbers as a reader writes them: "lines 3-5, 9"."""
    ranges: list[list[int]] = []
    for line in lines:
        if ranges and line == ranges[-1][1] + 1:
            ranges[-1][1] = line
        else:
            ranges.append([line, line])
    told = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return f"line {told}" if len(lines) == 1 else f"lines {told}"
