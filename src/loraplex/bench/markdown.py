"""report.md: the report's sentences and tables as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from loraplex.bench.sections import sections
from loraplex.measuring.section import Section


def markdown(report: Mapping[str, Any]) -> str:
    """Return the text of report.md."""
    return "\n\n".join(map(_section, sections(report))) + "\n"


def _section(one: Section) -> str:
    parts = [f"## {one.title}" if one.title else "# Benchmark", *one.texts]
    if one.table is not None:
        parts.append(_table(*one.table))
    if one.points:
        parts.append("\n".join(f"* {point}" for point in one.points))
    if one.code:
        parts.append(f"```console\n$ {one.code}\n```")
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(_cell, one))} |" for one in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]])


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
