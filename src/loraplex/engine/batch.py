"""A step -> the tensors of one forward pass."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch

from loraplex.engine.block_pool import BLOCK_SIZE
from loraplex.engine.sequence import Sequence
from loraplex.engine.step import Placed, Run, Step
from loraplex.model.kv_cache import KVCache
from loraplex.model.lora_linear import Segment, Segments
from loraplex.ops.layout import Layout, Span, layout_of

MOST_FILLED = 1 / 16  # of the tokens of segments that are made of one length
SHORTEST, NUM_LENGTHS = 4, 8  # where steps are to recur: multiples of so many tokens, so many up to twice a length


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """T packed tokens, of which some only fill a gap; S sequences that are answered; L tokens whose logits are wanted;
    N targets.

    The last token of every sequence is among the rows: its distribution gives the top token.
    """

    sequences: tuple[Sequence, ...]
    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T]
    segments: Segments
    layout: Layout
    cache: KVCache | None
    kept_rows: torch.Tensor | None  # [K] packed token indices
    kept_slots: torch.Tensor | None  # [K] slots of the cache
    kv_shapes: dict[int, tuple[int, int]]  # layer -> (num_kv_heads, head_dim), noted by the forward pass
    logit_rows: torch.Tensor  # [L] packed token indices, ascending
    last_layout: Layout  # of these L
    last_segments: Segments  # of these L
    last_row_indices: tuple[int, ...]  # [S] indices into logit_rows
    last_rows: torch.Tensor  # the same
    target_rows: torch.Tensor  # [N] indices into logit_rows
    target_ids: torch.Tensor  # [N] token ids


def pack(step: Step, device: torch.device, cache: KVCache | None = None, *, recurs_up_to: int = 0) -> Batch:
    """Sort the runs by slot, so that an adapter's tokens are one contiguous segment. Segments that are nearly of one
    length follow each other and are made of one length: what their adapters do is one product then.
    recurs_up_to: make the lengths of all segments few, so that steps with the same ones come again, where the step has
    at most so many tokens then."""

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    input_ids: list[int] = []
    position_ids: list[int] = []
    segments: list[Segment] = []
    start_of: dict[Run, int] = {}
    gaps: list[tuple[int, int]] = []
    by_slot: dict[int, list[Run]] = {}
    for run in step.runs():
        by_slot.setdefault(run.slot, []).append(run)
    lengths = {slot: sum(run.num_tokens for run in runs) for slot, runs in by_slot.items()}
    ordered = list(_even_lengths(lengths))
    if recurs_up_to:
        few = list(_even_lengths({slot: _recurring(length) for slot, length in lengths.items()}))
        ordered = few if sum(length for _, length in few) <= recurs_up_to else ordered
    for slot, length in ordered:
        start = len(input_ids)
        for run in by_slot[slot]:
            start_of[run] = len(input_ids)
            input_ids.extend(run.token_ids)
            position_ids.extend(range(run.start, run.end))
        end = start + length
        if len(input_ids) < end:
            gaps.append((len(input_ids), end))
            input_ids.extend([0] * (end - len(input_ids)))
            position_ids.extend([0] * (end - len(position_ids)))
        segments.append(Segment(slot, start, end))

    cached: dict[tuple[int, ...], torch.Tensor | None] = {(): None}
    spans = []
    for run in start_of:
        path = run.path()
        if run.cached not in cached:
            slots = [slot for block in run.cached for slot in range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)]
            cached[run.cached] = tensor(slots[: path[0].start])
        ancestors = tuple((start_of[one], start_of[one] + one.num_tokens) for one in path[:-1])
        start = start_of[run]
        spans.append(
            Span(
                start=start,
                end=start + run.num_tokens,
                position=run.start,
                cached=cached[run.cached],
                ancestors=ancestors,
            )
        )

    last_tokens: list[int] = []
    target_tokens: list[int] = []
    target_ids: list[int] = []
    kept_rows: list[int] = []
    kept_slots: list[int] = []
    answered = tuple(placed.sequence for placed in step.placed if not placed.is_chunk)
    for placed in step.placed:
        row_at = _row_at(placed, start_of)
        for index, block in placed.kept.items():
            positions = placed.kept_positions(index)
            kept_rows += map(row_at, positions)
            kept_slots += [block * BLOCK_SIZE + position % BLOCK_SIZE for position in positions]
        if placed.is_chunk:
            continue
        sequence = placed.sequence
        last_tokens.append(row_at(sequence.num_tokens - 1))
        for target in sequence.targets:
            target_tokens.append(row_at(sequence.num_tokens + target.position))
            target_ids.append(target.token_id)
    # Sequences may share them. Of a step with nothing but chunks one is computed and not used: models expect one.
    logit_rows = sorted({*last_tokens, *target_tokens}) or [spans[-1].end - 1]
    row_of = {token: row for row, token in enumerate(logit_rows)}
    last_rows = [row_of[token] for token in last_tokens]

    return Batch(
        sequences=answered,
        input_ids=tensor(input_ids).unsqueeze(0),
        position_ids=tensor(position_ids).unsqueeze(0),
        segments=Segments(segments),
        layout=layout_of(tuple(spans), device, gaps),
        last_layout=layout_of(tuple(_asking(spans, logit_rows)), device),
        last_segments=Segments(_segments_of(segments, logit_rows)),
        cache=cache,
        kept_rows=tensor(kept_rows) if kept_rows else None,
        kept_slots=tensor(kept_slots) if kept_rows else None,
        kv_shapes={},
        logit_rows=tensor(logit_rows),
        last_row_indices=tuple(last_rows),
        last_rows=tensor(last_rows),
        target_rows=tensor([row_of[token] for token in target_tokens]),
        target_ids=tensor(target_ids),
    )


def _even_lengths(lengths: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Slots in the order in which their tokens are packed, and to how many tokens each is filled up: the base and what
    precedes an activation first, since others attend to it, then the shortest."""
    yield from sorted((slot, length) for slot, length in lengths.items() if slot < 0)
    others = sorted((length, slot) for slot, length in lengths.items() if slot >= 0)
    first = num_tokens = 0
    for i, (length, _) in enumerate(others):
        # The i-th joins those before it where few tokens fill them up to its length.
        num_filled = length * (i - first) - num_tokens
        if num_filled > MOST_FILLED * length * (i - first + 1):
            yield from ((slot, others[i - 1][0]) for _, slot in others[first:i])
            first, num_tokens = i, 0
        num_tokens += length
    yield from ((slot, others[-1][0]) for _, slot in others[first:])


def _recurring(length: int) -> int:
    """The next one that is not filled."""
    unit = max(SHORTEST, (1 << length.bit_length() - 1) // NUM_LENGTHS)
    return -(-length // unit) * unit


def _asking(spans: Seq[Span], tokens: Seq[int]) -> Iterator[Span]:
    """For each of the tokens, in ascending order, the part of its span that it sees."""
    starts = [span.start for span in spans]
    for row, token in enumerate(tokens):
        span = spans[bisect_right(starts, token) - 1]
        yield replace(span, end=token + 1, row=row)


def _segments_of(segments: Seq[Segment], tokens: Seq[int]) -> Iterator[Segment]:
    """The same segments, of some tokens in ascending order."""
    for segment in segments:
        start, end = bisect_left(tokens, segment.start), bisect_left(tokens, segment.end)
        if start < end:
            yield Segment(segment.slot, start, end)


def _row_at(placed: Placed, start_of: Mapping[Run, int]) -> Callable[[int], int]:
    """Position in a sequence -> packed token."""
    assert placed.last is not None, "the sequence is not in the step"
    runs = [(run.start, run.end, start_of[run]) for run in placed.last.path()]

    def row_at(position: int) -> int:
        for start, end, row in runs:
            if start <= position < end:
                return row + position - start
        raise AssertionError(f"position {position} is not computed in this step")

    return row_at
