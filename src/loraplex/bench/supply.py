"""Gives out conversations as jobs, in the same order to every system. One that is asked more gets further ones."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from loraplex.bench.call import Call
from loraplex.bench.load import Job, Phase
from loraplex.labelled import Labelled
from loraplex.types import Message

Asking = Literal["together", "each"]
Conversation = str | tuple[Message, ...]

SPEAKER = re.compile(r"([^\s:][^:\n]{0,40}):\s")  # how a turn begins in a text


class Supply:
    """The conversations for one system. Each is asked as it is once. Asked again, its text begins with a number that
    no other has, such as "#12 ", so that no system knows it from before."""

    def __init__(
        self,
        rows: Sequence[Labelled],
        classifiers: tuple[str, ...],
        *,
        asking: Asking = "together",
        turns: bool = False,
    ) -> None:
        """asking: all classifiers in one request, or a request for each. turns: a conversation arrives turn by turn."""
        self._rows, self._classifiers = rows, classifiers
        self._is_together, self._by_turns = asking == "together", turns
        self._num_taken = self._num_aside = self._num_repeats = 0

    def take(self, phase: Phase, index: int, at_s: float = 0.0, *, counts: bool | None = None) -> Job:
        """Return the next conversation. counts: False returns one from the data's end, as a repeated one; by default
        what is measured counts. Those of a warm-up are others than those that are measured next, where the data
        suffices: a system may keep a part of what it has computed."""
        if phase == "measured" if counts is None else counts:
            repeat, conversation = divmod(self._num_taken, len(self._rows))
            self._num_taken += 1
        else:
            self._num_aside += 1
            repeat, conversation = 1, -self._num_aside % len(self._rows)
        given: Conversation = self._rows[conversation].input
        if repeat:
            self._num_repeats += 1
            given = numbered(given, self._num_repeats)
        key = f"bench-{conversation}-{self._num_repeats if repeat else 0}" if self._by_turns else None
        asked = [self._classifiers] if self._is_together else [(name,) for name in self._classifiers]
        turns = turns_of(given) if self._by_turns else [given]
        return Job(
            index=index,
            conversation=conversation,
            turns=tuple(
                tuple(Call(input=turn, classifiers=names, conversation_id=key) for names in asked) for turn in turns
            ),
            phase=phase,
            at_s=at_s,
            repeat=repeat,
        )


def numbered(given: Conversation, number: int) -> Conversation:
    """Return the conversation with a number before its first text."""
    if isinstance(given, str):
        return f"#{number} {given}"
    return (replace(given[0], content=f"#{number} {given[0].content}"), *given[1:])


def turns_of(given: Conversation) -> list[Conversation]:
    """Return the conversation as it was at each turn of the one who spoke last. A text's turns are lines that begin
    with a name and a colon; a text without them has one turn."""
    if not isinstance(given, str):
        return [given[: i + 1] for i, one in enumerate(given) if one.role == given[-1].role]
    lines = given.splitlines(keepends=True)
    spoken: list[tuple[str, int]] = []  # who, and the line after
    for number, line in enumerate(lines, start=1):
        if found := SPEAKER.match(line):
            spoken.append((found[1], number))
        elif spoken:
            spoken[-1] = spoken[-1][0], number
    ends = [end for who, end in spoken if who == spoken[-1][0]]
    return [*("".join(lines[:end]).rstrip("\n") for end in ends[:-1]), given]
