"""Who attends to what in a packed step. Knows no queries, keys or values."""

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch

from loraplex.ops.staging import Staging

# On a CPU, spans of at most SHORT_SPAN tokens attend together, at most MASKED_TOKENS per call. Computing the scores
# that the mask hides costs less than one call per span.
SHORT_SPAN, MASKED_TOKENS = 64, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Packed tokens start ... end - 1, at consecutive positions from `position` on.

    Each token sees the tokens in `cached` (cache slots), then the packed spans in `ancestors`, then its own span,
    causally. If only the last token is a query, `row` is its index among the queries.
    """

    start: int
    end: int
    row: int | None = None
    position: int = 0
    cached: torch.Tensor | None = None  # [num_cached]
    ancestors: tuple[tuple[int, int], ...] = ()

    @property
    def queries(self) -> tuple[int, int]:
        return (self.start, self.end) if self.row is None else (self.row, self.row + 1)


class Varlen(NamedTuple):
    """Several sequences for a kernel that takes all of them in one call.

    cu_queries, cu_keys:      where each sequence begins, and where the last one ends.
    most_queries, most_keys:  the length of the longest sequence.
    """

    cu_queries: torch.Tensor  # [num_sequences + 1] int32
    cu_keys: torch.Tensor  # [num_sequences + 1] int32
    most_queries: int
    most_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Tokens that other spans see whole: packed tokens start ... end - 1, or the cache slots in `cached`.

    `rows` are the queries of all spans that see these tokens. One attention call serves all spans that share a prefix.
    """

    rows: torch.Tensor | slice  # [num_rows]
    varlen: Varlen  # one sequence
    start: int = 0
    end: int = 0
    cached: torch.Tensor | None = None  # [num_cached]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedGroup:
    """Short spans with the same cached tokens and ancestors, computed in one attention call under a mask. The queries
    `rows` attend to the `cached` tokens and the packed ranges in `keys`."""

    rows: torch.Tensor | slice  # [n]
    cached: torch.Tensor | None
    keys: tuple[tuple[int, int], ...]
    mask: torch.Tensor  # [n, num_keys] float32: 0 where a query sees a key, else -inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the spans of a step attend.

    groups:    short spans that attend together, on a CPU.
    alone:     all other spans.
    contexts:  the tokens that spans in `alone` see before themselves.
    padding:   packed tokens of no span, whose attention nobody reads.
    varlen:    each span and each range of padding as a sequence, with its own tokens as keys.
    own_keys:  the keys of `varlen` as packed tokens, if spans have a `row`; None: all packed tokens in order.
    """

    spans: tuple[Span, ...]
    alone: tuple[Span, ...] = ()
    groups: tuple[MaskedGroup, ...] = ()
    contexts: tuple[Context, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    varlen: Varlen
    own_keys: torch.Tensor | None = None

    @property
    def num_positions(self) -> int:
        return max((span.position + span.end - span.start for span in self.spans), default=0)


def layout_of(spans: tuple[Span, ...], staging: Staging, padding: Iterable[tuple[int, int]] = ()) -> Layout:
    """Return the layout of `spans`, grouped by what they see. Its tensors are valid once `staging` has sent them."""
    members = _short_spans(spans) if staging.device.type == "cpu" else []
    grouped = {id(span) for group in members for span in group}
    alone = tuple(span for span in spans if id(span) not in grouped)
    rows: dict[object, list[Span]] = {}
    cached: dict[object, torch.Tensor] = {}
    for span in alone:
        if span.cached is not None:
            rows.setdefault(id(span.cached), []).append(span)
            cached[id(span.cached)] = span.cached
        for ancestor in span.ancestors:
            rows.setdefault(ancestor, []).append(span)
    contexts = []
    for seen, by in rows.items():
        which, num_rows = _rows_of(by, staging), sum(end - start for start, end in (span.queries for span in by))
        if isinstance(seen, tuple):
            varlen = _varlen([num_rows], [seen[1] - seen[0]], staging)
            contexts.append(Context(rows=which, varlen=varlen, start=seen[0], end=seen[1]))
        else:
            varlen = _varlen([num_rows], [len(cached[seen])], staging)
            contexts.append(Context(rows=which, varlen=varlen, cached=cached[seen]))
    padding, own_keys = tuple(padding), None
    if all(span.row is None for span in spans):
        ranges = sorted([*(span.queries for span in spans), *padding])
        lengths = [end - start for start, end in ranges]
        varlen = _varlen(lengths, lengths, staging)
    else:
        by_row = sorted(spans, key=lambda span: span.queries)
        varlen = _varlen([1] * len(spans), [span.end - span.start for span in by_row], staging)
        own_keys = staging.put([key for span in by_row for key in range(span.start, span.end)])
    return Layout(
        spans=spans,
        alone=alone,
        groups=tuple(_masked_group(group, staging) for group in members),
        contexts=tuple(contexts),
        padding=padding,
        varlen=varlen,
        own_keys=own_keys,
    )


def _varlen(queries: list[int], keys: list[int], staging: Staging) -> Varlen:
    cu_queries, cu_keys = (staging.put([0, *itertools.accumulate(lengths)], torch.int32) for lengths in (queries, keys))
    return Varlen(cu_queries, cu_keys, max(queries), max(keys))


def _rows_of(spans: Seq[Span], staging: Staging) -> torch.Tensor | slice:
    """Return the queries of the spans; a slice if they are contiguous."""
    ranges = sorted(span.queries for span in spans)
    if all(end == start for (_, end), (start, _) in itertools.pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return staging.put([row for start, end in ranges for row in range(start, end)])


def _short_spans(spans: Seq[Span]) -> list[list[Span]]:
    """Return the short spans, grouped by what they see, at most MASKED_TOKENS per group. A span alone that sees only
    itself is left out: it needs no mask."""
    groups: list[list[Span]] = []
    open_at: dict[object, tuple[int, int]] = {}  # what is seen -> index of the open group, and its tokens
    for span in spans:
        if span.end - span.start <= SHORT_SPAN:
            seen = (None if span.cached is None else id(span.cached), span.ancestors)
            at, num_tokens = open_at.get(seen, (0, MASKED_TOKENS))
            num_tokens += span.end - span.start
            if num_tokens > MASKED_TOKENS:
                at, num_tokens = len(groups), span.end - span.start
                groups.append([])
            groups[at].append(span)
            open_at[seen] = at, num_tokens
    return [group for group in groups if len(group) > 1 or group[0].cached is not None or group[0].ancestors]


def _masked_group(spans: Seq[Span], staging: Staging) -> MaskedGroup:
    spans = sorted(spans, key=lambda span: span.queries)
    first = spans[0]
    num_seen = sum(end - start for start, end in first.ancestors) + (0 if first.cached is None else len(first.cached))
    lengths = torch.tensor([span.end - span.start for span in spans])
    owner = torch.repeat_interleave(lengths)  # [num_own] which span a token belongs to
    sees = torch.ones(len(owner), len(owner), dtype=torch.bool).tril_() & (owner[:, None] == owner)
    if first.row is not None:  # only the last token of each span is a query
        sees = sees[lengths.cumsum(0) - 1]
    mask = torch.zeros(len(sees), num_seen + len(owner))
    mask[:, num_seen:].masked_fill_(~sees, float("-inf"))
    keys: list[tuple[int, int]] = []
    for start, end in (*first.ancestors, *((span.start, span.end) for span in spans)):
        if keys and keys[-1][1] == start:
            keys[-1] = (keys[-1][0], end)
        else:
            keys.append((start, end))
    return MaskedGroup(rows=_rows_of(spans, staging), cached=first.cached, keys=tuple(keys), mask=mask)
