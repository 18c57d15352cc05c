"""Finds the labelled rows of one conversation, so that none of it is trained on and judged by at the same time."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping
from collections.abc import Sequence as Seq
from types import MappingProxyType

from loraplex.labelled import Labelled, said_in

Prompts = Mapping[int, Collection[Hashable]]  # the row's place -> what identifies its prompts
NO_PROMPTS: Prompts = MappingProxyType({})
MOST_CONTINUATIONS = 3  # a beginning with more of them is a greeting, with which unrelated conversations begin


def copies(rows: Seq[Labelled], prompts: Prompts = NO_PROMPTS) -> list[int]:
    """Return for each row the place of the first row with the same words, or with the same prompt."""
    return _joined([(_words(row), *prompts.get(index, ())) for index, row in enumerate(rows)])


def conversations(rows: Seq[Labelled], prompts: Prompts = NO_PROMPTS) -> list[str]:
    """Return what identifies each row's conversation. Copies are of one conversation, rows with the same
    `conversation_id`, and rows of which one is the beginning of the other. A beginning with which more than
    MOST_CONTINUATIONS conversations go on differently belongs to none of them."""
    keys: list[list[Hashable]] = [[first] for first in copies(rows, prompts)]
    turns = [_turns(row) for row in rows]
    for index, row in enumerate(rows):
        keys[index].append(turns[index])
        if row.conversation_id is not None:
            keys[index].append((None, row.conversation_id))  # turns are texts
    first_of = {said: index for index, said in reversed([*enumerate(turns)])}
    for beginning, longer in _continued(first_of):
        keys[first_of[longer]].append(beginning)
    members: dict[int, list[int]] = defaultdict(list)
    for index, first in enumerate(_joined(keys)):
        members[first].append(index)
    words = [_words(row) for row in rows]
    found = [""] * len(rows)
    for of in members.values():
        for index in of:
            found[index] = min(words[one] for one in of)
    return found


def _words(row: Labelled) -> str:
    return hashlib.sha256(" ".join(said_in(row).split()).casefold().encode(errors="replace")).hexdigest()


def _turns(row: Labelled) -> tuple[str, ...]:
    return tuple(said for line in said_in(row).casefold().splitlines() if (said := " ".join(line.split())))


def _continued(turns: Collection[tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Yield pairs of a beginning and the next longer ones."""
    continued: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    open_ones: list[tuple[str, ...]] = []  # each is a beginning of the next
    for one in sorted(turns):  # what begins alike stands together, the shortest first
        while open_ones and one[: len(open_ones[-1])] != open_ones[-1]:
            open_ones.pop()
        if open_ones:
            continued[open_ones[-1]].append(one)
        open_ones.append(one)
    for beginning, longer in continued.items():
        if len({one[len(beginning)] for one in longer}) <= MOST_CONTINUATIONS:
            yield from ((beginning, one) for one in longer)


def _joined(keys: Seq[Collection[Hashable]]) -> list[int]:
    """Return for each place the first one that shares a key with it, be it by way of others."""
    leads_to = list(range(len(keys)))

    def first(index: int) -> int:
        while leads_to[index] != index:
            leads_to[index] = leads_to[leads_to[index]]
            index = leads_to[index]
        return index

    seen: dict[Hashable, int] = {}
    for index, of in enumerate(keys):
        for key in of:
            one, other = sorted((first(index), first(seen.setdefault(key, index))))
            leads_to[other] = one
    return [first(index) for index in range(len(keys))]
