"""Gives out conversations as jobs, the same ones in the same order to every system."""

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
        self._num_taken = self._num_repeats = 0

    def take(self, phase: Phase, index: int, at_s: float = 0.0, *, counts: bool | None = None) -> Job:
        """Return the next conversation. counts: False returns it as a repeated one, and again the next time; by default
        what is measured counts."""
        conversation = self._num_taken % len(self._rows)
        repeat = self._num_taken // len(self._rows)
        if phase == "measured" if counts is None else counts:
            self._num_taken += 1
        else:
            repeat += 1
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
