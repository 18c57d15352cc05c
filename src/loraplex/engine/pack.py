"""Packs a step into the tensors of one forward pass."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch

from loraplex.engine.block_pool import BLOCK_SIZE
from loraplex.engine.sequence import Sequence
from loraplex.engine.step import Placed, Run, Step
from loraplex.model.inputs import ModelInputs, Segment, Segments
from loraplex.ops.layout import Span, layout_of
from loraplex.ops.staging import Staging

MAX_PADDING = 1 / 16  # padding tokens, as a share of the tokens of segments that are padded to one length
# Segment lengths that recur: multiples of at least SHORTEST tokens, NUM_LENGTHS of them between two powers of two.
SHORTEST, NUM_LENGTHS = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A packed step: the model's inputs, and the rows for each of the S sequences and N targets.

    The rows include the last token of every answered sequence, because its distribution gives the next token.
    """

    inputs: ModelInputs
    sequences: tuple[Sequence, ...]  # [S]
    last_rows: tuple[int, ...]  # [S] indices into the logit rows
    last_row_ids: torch.Tensor  # `last_rows` as a tensor
    target_rows: torch.Tensor  # [N] indices into the logit rows
    target_ids: torch.Tensor  # [N] token ids


def pack(step: Step, staging: Staging, *, recurs_up_to: int = 0) -> Batch:
    """Pack the runs sorted by slot, so that each adapter's tokens form one contiguous segment.

    Segments of nearly the same length follow each other and are padded to one length, so that one batched product
    computes their adapters.

    recurs_up_to: pad all segments to a few lengths, so that steps with the same segments recur, unless the padded
    step has more tokens than this. 0 turns it off.
    """
    staging.begin()
    input_ids: list[int] = []
    position_ids: list[int] = []
    segments: list[Segment] = []
    start_of: dict[Run, int] = {}
    padding: list[tuple[int, int]] = []
    by_slot: dict[int, list[Run]] = {}
    for run in step.runs():
        by_slot.setdefault(run.slot, []).append(run)
    for slot, length in _padded_lengths(by_slot, recurs_up_to):
        start = len(input_ids)
        for run in by_slot[slot]:
            start_of[run] = len(input_ids)
            input_ids.extend(run.token_ids)
            position_ids.extend(range(run.start, run.end))
        end = start + length
        if len(input_ids) < end:
            padding.append((len(input_ids), end))
            input_ids.extend([0] * (end - len(input_ids)))
            position_ids.extend([0] * (end - len(position_ids)))
        segments.append(Segment(slot, start, end))

    spans = _spans(start_of, staging)
    kv_rows: list[int] = []
    kv_slots: list[int] = []
    last_tokens: list[int] = []
    targets: list[tuple[int, int]] = []  # packed token, token id
    answered = tuple(placed.sequence for placed in step.placed if not placed.is_chunk)
    for placed in step.placed:
        row_at = _row_at(placed, start_of)
        for index, block in placed.kept.items():
            positions = placed.kept_positions(index)
            kv_rows += map(row_at, positions)
            kv_slots += [block * BLOCK_SIZE + position % BLOCK_SIZE for position in positions]
        if not placed.is_chunk:
            sequence = placed.sequence
            last_tokens.append(row_at(sequence.num_tokens - 1))
            targets += [(row_at(sequence.num_tokens + one.position), one.token_id) for one in sequence.targets]
    # Sequences may share a row. A step of chunks alone computes one row that nobody reads: models expect at least one.
    logit_rows = sorted({*last_tokens, *(token for token, _ in targets)}) or [spans[-1].end - 1]
    row_of = {token: row for row, token in enumerate(logit_rows)}
    last_rows = [row_of[token] for token in last_tokens]
    batch = Batch(
        inputs=ModelInputs(
            input_ids=staging.put(input_ids),
            position_ids=staging.put(position_ids),
            segments=Segments(segments),
            layout=layout_of(spans, staging, padding),
            kv_rows=staging.put(kv_rows) if kv_rows else None,
            kv_slots=staging.put(kv_slots) if kv_rows else None,
            logit_rows=staging.put(logit_rows),
            last_segments=Segments(_segments_of(segments, logit_rows)),
            last_layout=layout_of(tuple(_asking(spans, logit_rows)), staging),
        ),
        sequences=answered,
        last_rows=tuple(last_rows),
        last_row_ids=staging.put(last_rows),
        target_rows=staging.put([row_of[token] for token, _ in targets]),
        target_ids=staging.put([token_id for _, token_id in targets]),
    )
    staging.send()
    return batch


def _spans(start_of: Mapping[Run, int], staging: Staging) -> tuple[Span, ...]:
    """Return one span for each run, in packed order."""
    cached: dict[tuple[int, ...], torch.Tensor | None] = {(): None}
    spans = []
    for run, start in start_of.items():
        path = run.path()
        if run.cached not in cached:
            slots = [slot for block in run.cached for slot in range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)]
            cached[run.cached] = staging.put(slots[: path[0].start])
        spans.append(
            Span(
                start=start,
                end=start + run.num_tokens,
                position=run.start,
                cached=cached[run.cached],
                ancestors=tuple((start_of[one], start_of[one] + one.num_tokens) for one in path[:-1]),
            )
        )
    return tuple(spans)


def _padded_lengths(by_slot: Mapping[int, Seq[Run]], recurs_up_to: int) -> list[tuple[int, int]]:
    """Return (slot, length of its segment with padding) in packed order."""
    lengths = {slot: sum(run.num_tokens for run in runs) for slot, runs in by_slot.items()}
    if recurs_up_to:
        recurring = list(_even_lengths({slot: _recurring(length) for slot, length in lengths.items()}))
        if sum(length for _, length in recurring) <= recurs_up_to:
            return recurring
    return list(_even_lengths(lengths))


def _even_lengths(lengths: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Yield (slot, padded length) in packed order: first the base and the prefix slots, which other segments attend
    to, then the other slots, shortest first."""
    yield from sorted((slot, length) for slot, length in lengths.items() if slot < 0)
    others = sorted((length, slot) for slot, length in lengths.items() if slot >= 0)
    first = num_tokens = 0
    for i, (length, _) in enumerate(others):
        # Segment i joins those before it where little padding brings them to its length.
        num_padding = length * (i - first) - num_tokens
        if num_padding > MAX_PADDING * length * (i - first + 1):
            yield from ((slot, others[i - 1][0]) for _, slot in others[first:i])
            first, num_tokens = i, 0
        num_tokens += length
    yield from ((slot, others[-1][0]) for _, slot in others[first:])


def _recurring(length: int) -> int:
    """Round `length` up to a length that recurs."""
    unit = max(SHORTEST, (1 << length.bit_length() - 1) // NUM_LENGTHS)
    return -(-length // unit) * unit


def _asking(spans: Seq[Span], tokens: Seq[int]) -> Iterator[Span]:
    """Yield for each token, in ascending order, the part of its span that the token sees."""
    starts = [span.start for span in spans]
    for row, token in enumerate(tokens):
        span = spans[bisect_right(starts, token) - 1]
        yield replace(span, end=token + 1, row=row)


def _segments_of(segments: Seq[Segment], tokens: Seq[int]) -> Iterator[Segment]:
    """Yield the segments of a selection of tokens, which are in ascending order."""
    for segment in segments:
        start, end = bisect_left(tokens, segment.start), bisect_left(tokens, segment.end)
        if start < end:
            yield Segment(segment.slot, start, end)


def _row_at(placed: Placed, start_of: Mapping[Run, int]) -> Callable[[int], int]:
    """Return a function that maps a position in the sequence to its packed token."""
    assert placed.last is not None, "the sequence is not in the step"
    runs = [(run.start, run.end, start_of[run]) for run in placed.last.path()]

    def row_at(position: int) -> int:
        for start, end, row in runs:
            if start <= position < end:
                return row + position - start
        raise AssertionError(f"position {position} is not computed in this step")

    return row_at
