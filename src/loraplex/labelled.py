"""Reads conversations with labels: a JSON object on each line of a .jsonl or .jsonl.gz file."""

import gzip
import json
import math
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loraplex.bundle import NAME
from loraplex.errors import MOST_SHOWN, ConfigurationError, InvalidRequestError, listed, quoted
from loraplex.messages import conversation_of
from loraplex.types import Message

Label = bool | str | Mapping[str, float]  # yes or no, a label's name, or a share for each label
TEXTS = ("conversation", "text", "messages")  # one of these keys holds the conversation
CONVERSATION_ID = "conversation_id"  # the same in all lines of one conversation
EXPORTED = "ids"  # of requests: only rows of `loraplex routes export` have this key
ITEM = "item"  # does so in mellea's files; beside one of the others it may mean anything
YES_NO = (("yes", "no"), ("true", "false"))  # what true and false stand for, where a contract has such labels
BOM = b"\xef\xbb\xbf"  # which some editors write before UTF-8
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A conversation, and what is known about it.

    line:    its line in the file, from 1.
    labels:  classifier -> label. May be empty, and may name classifiers that nobody asks.
    is_exported:  whether `loraplex routes export` wrote it, so that a server keeps it for a bounded time.
    conversation_id:  what the file says; rows with the same one are of one conversation, such as its turns.
    """

    line: int
    input: str | tuple[Message, ...]
    labels: Mapping[str, Label]
    is_exported: bool = False
    conversation_id: str | None = None


def read_labelled(
    path: Path,
    contracts: Mapping[str, Sequence[str]] = MappingProxyType({}),
    classifier: str | None = None,
    *,
    option: str | None = None,
    new: Collection[str] | None = None,
) -> tuple[Labelled, ...]:
    """Return the conversations of a file, in order. Empty lines are left out.

    contracts:   classifier -> its contract's labels. Labels for these classifiers must be among them.
    classifier:  the one that a line's `label` is for, where the line has no `labels`.
    option:      how the user names this classifier. A `label` that is for no classifier is then an error.
    new:         the classifiers that get their labels from the data; all of its names where this is empty. Their names
                 must be possible, and their labels written in one way.
    Raises ConfigurationError, which names all lines that cannot be read, or says that there are none.
    """
    found: list[Labelled] = []
    wrong: dict[str, list[int]] = {}  # what is wrong -> lines
    for number, line in _lines(path):
        try:
            row = _row(number, line, classifier, option)
            for name, labels in contracts.items():
                if name in row.labels:
                    hard_label(row.labels[name], labels, name)
            if new is not None:
                _check_names(row, new)
        except _Wrong as exc:
            wrong.setdefault(str(exc), []).append(number)
        else:
            found.append(row)
    if new is not None:
        for name in dict.fromkeys(name for row in found for name in row.labels):
            if name not in contracts and (not new or name in new):
                wrong |= _spelled_otherwise(name, found)
    refuse_lines(path, wrong)
    if not found:
        raise ConfigurationError(path, "holds no conversations", remedy=f'write lines such as {{"{TEXTS[1]}": "…"}}')
    return tuple(found)


def refuse_lines(path: Path, wrong: Mapping[str, Sequence[int]]) -> None:
    """Raise ConfigurationError where there is anything wrong. wrong: what is wrong -> the numbers of its lines. All
    lines are named; what is wrong with them only until there are too many kinds."""
    if wrong:
        kinds = [*wrong.items()]
        told = [f"{numbers(lines)}: {what}" for what, lines in kinds[:MOST_SHOWN]]
        if rest := sorted({line for _, lines in kinds[MOST_SHOWN:] for line in lines}):
            told.append(f"{numbers(rest)}: more of this kind")
        raise ConfigurationError(path, "; ".join(told), remedy="correct these lines, or remove them")


def hard_label(label: Label, labels: Sequence[str], name: str = "") -> str:
    """Return the one of a contract's labels that `label` means; of several shares, the one with the largest.

    name:  the classifier's, for the error. Raises ValueError where none of the labels is meant."""
    if isinstance(label, bool):
        return _yes_no(labels, name)[0 if label else 1]
    plain = {one.strip(): one for one in labels}
    for one in [label] if isinstance(label, str) else label:
        if one not in plain:
            raise _Wrong(f"label {quoted(one)} of {quoted(name)} is not among the contract's: {listed(labels)}")
    return plain[label if isinstance(label, str) else max(label, key=lambda one: label[one])]


def label_shares(label: Label, labels: Sequence[str], name: str) -> Mapping[int, float]:
    """Return label's index -> share, of the contract's labels. Raises ValueError as `hard_label` does."""
    if isinstance(label, Mapping):
        hard_label(label, labels, name)  # names what is not among the labels
        plain, total = [one.strip() for one in labels], sum(label.values())
        return {plain.index(one): share / total for one, share in label.items() if share > 0}
    return {labels.index(hard_label(label, labels, name)): 1.0}


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
    if not os.path.isfile(path):  # unlike Path's own, it takes names that are too long
        is_there = os.path.exists(path)
        what = "is a folder" if os.path.isdir(path) else "is no plain file" if is_there else "there is no such file"
        raise ConfigurationError(
            path, what, remedy="give a .jsonl or .jsonl.gz file; not standard input, because it is read more than once"
        )
    try:
        with path.open("rb") as raw:
            start = raw.peek(2)[:2]
            if start in UTF_16:
                raise ConfigurationError(path, "is written in UTF-16", remedy="save it as UTF-8")
            with gzip.open(raw) if start == GZIP else raw as file:
                for number, line in enumerate(file, start=1):
                    if number == 1:
                        line = line.removeprefix(BOM)
                    if line.strip():
                        yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
        raise ConfigurationError(path, f"cannot be read: {exc}", remedy="give an archive that is whole") from None
    except OSError as exc:
        raise ConfigurationError(
            path, f"cannot be read: {exc.strerror or exc}", remedy="make it readable, or give another file"
        ) from None


def _row(number: int, line: bytes, classifier: str | None, option: str | None) -> Labelled:
    try:
        row: Any = json.loads(line.decode().rstrip("\r\n"), object_pairs_hook=_object)
    except _Wrong:
        raise
    except UnicodeDecodeError as exc:
        raise _Wrong(f"is not UTF-8 at byte {exc.start + 1}: save the file as UTF-8") from None
    except json.JSONDecodeError as exc:
        what = exc.msg.removesuffix(" at").removesuffix(" starting")
        raise _Wrong(f"is not JSON: {what[:1].lower()}{what[1:]} at column {exc.colno}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or very many brackets
        raise _Wrong("is not JSON that can be read") from None
    if not isinstance(row, dict):
        raise _Wrong(f"is a {type(row).__name__}, not an object")
    given = [key for key in TEXTS if key in row] or [key for key in (ITEM,) if key in row]
    if len(given) != 1:
        raise _Wrong(f"has {listed(given) if given else 'no text'}: give one of {listed((*TEXTS, ITEM))}")
    labels = row.get("labels", {})
    if "labels" not in row and row.get("label") is not None:
        if classifier is not None:
            labels = {classifier: row["label"]}
        elif option is not None:
            raise _Wrong(f"has a 'label' for no classifier: give one {option} NAME, or write \"labels\": {{NAME: …}}")
    id = row.get(CONVERSATION_ID)
    if not isinstance(id, str | int | None):
        raise _Wrong(f"{quoted(CONVERSATION_ID)} is a {type(id).__name__}, not text")
    return Labelled(
        line=number,
        input=_input(given[0], row[given[0]]),
        labels=_labels(labels),
        is_exported=EXPORTED in row,
        conversation_id=None if id is None else str(id),
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


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Wrong(f"has {quoted(next(name for name in names if names.count(name) > 1))} twice in one object")
    return found


def _labels(given: Any) -> Mapping[str, Label]:
    if not isinstance(given, dict):
        raise _Wrong(f"'labels' is a {type(given).__name__}, not an object")
    # null: nobody knows
    return MappingProxyType({name: _label(name, label) for name, label in given.items() if label is not None})


def _label(name: str, label: Any) -> Label:
    """Return a label without spaces at its ends."""
    of = f"the label of {quoted(name)}"
    if isinstance(label, bool):
        return label
    if isinstance(label, dict):
        return _shares(of, label)
    if isinstance(label, int | float):
        raise _Wrong(f"{of} is {quoted(label)}, a number: write true or false, or a name in quotes")
    if not isinstance(label, str):
        raise _Wrong(f"{of} is a {type(label).__name__}: give true, false, a name, or shares that sum to 1")
    if not label.strip():
        raise _Wrong(f"{of} is empty")
    return label.strip()


def _shares(of: str, given: Mapping[str, Any]) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for label, share in given.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:  # NaN neither
            raise _Wrong(f"{of} gives {quoted(label)} a share of {quoted(share)}: give numbers from 0 to 1")
        if not label.strip() or label.strip() in found:
            raise _Wrong(f"{of} has shares for {quoted(label)}, which is empty or there twice")
        found[label.strip()] = share
    if not math.isclose(total := sum(found.values()), 1, abs_tol=0.01):
        raise _Wrong(f"{of} has shares that sum to {total:g}, not to 1")
    return found


def _check_names(row: Labelled, names: Collection[str]) -> None:
    for name in row.labels:
        if not NAME.fullmatch(name) and (not names or name in names):
            raise _Wrong(f"{quoted(name)} cannot name a classifier: use letters, digits, '.', '_' and '-'")


def _spelled_otherwise(name: str, rows: Iterable[Labelled]) -> dict[str, list[int]]:
    """Return what is wrong with the spelling of a classifier's labels, with the lines: labels that mean the same, and
    true or false beside names other than yes and no. The spelling of fewer lines counts as wrong."""
    spelled: dict[str, dict[str, list[int]]] = {}  # what it means -> as it is written -> lines
    booleans, names = [], []  # lines with true or false, and with names other than yes and no
    for row in rows:
        label = row.labels.get(name, ())
        if isinstance(label, bool):
            booleans.append(row.line)
            label = YES_NO[0][0 if label else 1]
        for one in [label] if isinstance(label, str) else label:
            plain = " ".join(one.split()).casefold()
            plain = dict(zip(YES_NO[1], YES_NO[0], strict=True)).get(plain, plain)
            spelled.setdefault(plain, {}).setdefault(one, []).append(row.line)
            if plain not in YES_NO[0]:
                names.append(row.line)
    wrong: dict[str, list[int]] = {}
    for spellings in spelled.values():
        usual, *others = sorted(spellings, key=lambda one: -len(spellings[one]))
        for one in others:
            what = f"label {quoted(one)} of {quoted(name)} is {quoted(usual)} elsewhere: write one of them"
            wrong[what] = spellings[one]
    if booleans and names:
        kinds = [(booleans, "true or false"), (sorted(set(names)), "a name other than yes and no")]
        (few, this), (_, that) = sorted(kinds, key=lambda one: len(one[0]))
        wrong[f"the label of {quoted(name)} is {this}, and elsewhere {that}: write one of them"] = few
    return wrong


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
