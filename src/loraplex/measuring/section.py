"""A part of a report, in words and figures, however it is then shown."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a report. `backquotes` in its texts and points mark what was typed or named.

    title:   empty for the beginning of the report.
    table:   (head, rows); the first column names the row, and the others are figures.
    points:  lines of a list behind the table.
    code:    a command.
    """

    title: str
    texts: Sequence[str] = ()
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    points: Sequence[str] = ()
    code: str = ""
