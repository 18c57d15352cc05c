"""Who attends to what in a packed step."""

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Packed tokens start ... end - 1, at consecutive positions from `position` on. They see what precedes them: the
    tokens in `cached` (slots of the K/V cache), then the packed spans in `ancestors`, then causally themselves.
    Where only the last of them asks, `row` is its place among the queries."""

    start: int
    end: int
    row: int | None = None
    position: int = 0
    cached: torch.Tensor | None = None  # [num_cached]
    ancestors: tuple[tuple[int, int], ...] = ()

    @property
    def queries(self) -> tuple[int, int]:
        return (self.start, self.end) if self.row is None else (self.row, self.row + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Tokens that other spans see whole: of this step (`start`, `end`), or `cached`. `rows` are the queries of the
    spans that see them, so one attention call serves all who share a prefix."""

    rows: torch.Tensor | slice  # [num_rows]
    start: int = 0
    end: int = 0
    cached: torch.Tensor | None = None  # [num_cached]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """cu_seqlens: where the spans end, for kernels that take all of them in one call; None where a span has `row`."""

    spans: tuple[Span, ...]
    contexts: tuple[Context, ...] = ()
    cu_seqlens: torch.Tensor | None = None  # [num_spans + 1] int32

    @property
    def num_positions(self) -> int:
        return max((span.position + span.end - span.start for span in self.spans), default=0)


def layout_of(spans: tuple[Span, ...], device: torch.device) -> Layout:
    """Groups spans by what they see."""
    rows: dict[object, list[Span]] = {}
    cached: dict[object, torch.Tensor] = {}
    for span in spans:
        if span.cached is not None:
            rows.setdefault(id(span.cached), []).append(span)
            cached[id(span.cached)] = span.cached
        for ancestor in span.ancestors:
            rows.setdefault(ancestor, []).append(span)
    contexts = []
    for seen, by in rows.items():
        ranges = sorted(span.queries for span in by)
        if all(end == start for (_, end), (start, _) in itertools.pairwise(ranges)):
            which: torch.Tensor | slice = slice(ranges[0][0], ranges[-1][1])
        else:
            which = torch.cat([torch.arange(start, end) for start, end in ranges]).to(device)
        if isinstance(seen, tuple):
            contexts.append(Context(rows=which, start=seen[0], end=seen[1]))
        else:
            contexts.append(Context(rows=which, cached=cached[seen]))
    ends = None
    if all(span.row is None for span in spans):
        ends = torch.tensor([0, *(span.end for span in spans)], dtype=torch.int32).to(device, non_blocking=True)
    return Layout(spans=spans, contexts=tuple(contexts), cu_seqlens=ends)
