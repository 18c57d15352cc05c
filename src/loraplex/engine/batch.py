"""A step -> the tensors of one forward pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from loraplex.engine.block_pool import BLOCK_SIZE
from loraplex.engine.sequence import Sequence
from loraplex.engine.step import Placed, Run, Step
from loraplex.model.kv_cache import KVCache
from loraplex.model.lora_linear import Segment
from loraplex.ops.layout import Layout, Span, layout_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """T packed tokens, sorted by slot; S sequences that are answered; L rows whose logits are wanted; N targets.

    The last token of every sequence is among the rows: its distribution gives the top token.
    """

    sequences: tuple[Sequence, ...]
    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T]
    segments: tuple[Segment, ...]
    layout: Layout
    cache: KVCache | None
    kept_rows: torch.Tensor | None  # [K] packed token indices
    kept_slots: torch.Tensor | None  # [K] slots of the cache
    kv_shapes: dict[int, tuple[int, int]]  # layer -> (num_kv_heads, head_dim), noted by the forward pass
    logit_rows: torch.Tensor  # [L] packed token indices
    last_rows: torch.Tensor  # [S] indices into logit_rows
    target_rows: torch.Tensor  # [N] indices into logit_rows
    target_ids: torch.Tensor  # [N] token ids


def pack(step: Step, device: torch.device, cache: KVCache | None = None) -> Batch:
    """Sort the runs by slot, so that an adapter's tokens are one contiguous segment, and lay out without padding."""

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    input_ids: list[int] = []
    position_ids: list[int] = []
    segments: list[Segment] = []
    start_of: dict[Run, int] = {}
    runs = sorted(step.runs(), key=lambda run: run.slot)  # stable: parents stay before their children
    for run in runs:
        start_of[run] = start = len(input_ids)
        input_ids.extend(run.token_ids)
        position_ids.extend(range(run.start, run.end))
        if segments and segments[-1].slot == run.slot:
            segments[-1] = segments[-1]._replace(end=len(input_ids))
        else:
            segments.append(Segment(run.slot, start, len(input_ids)))

    cached: dict[tuple[int, ...], torch.Tensor | None] = {(): None}
    spans = []
    for run in runs:
        if run.cached not in cached:
            cached[run.cached] = tensor([slot for block in run.cached for slot in _slots(block)])
        ancestors = tuple((start_of[one], start_of[one] + one.num_tokens) for one in run.path()[:-1])
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

    logit_rows: list[int] = []
    last_rows: list[int] = []
    target_rows: list[int] = []
    target_ids: list[int] = []
    kept_rows: list[int] = []
    kept_slots: list[int] = []
    row_of: dict[int, int] = {}  # packed token -> its place in logit_rows: sequences may share it
    answered = tuple(placed.sequence for placed in step.placed if not placed.is_chunk)
    for placed in step.placed:
        row_at = _row_at(placed, start_of)
        for index, block in placed.kept.items():
            kept_rows += map(row_at, range(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE))
            kept_slots += _slots(block)
        if placed.is_chunk:
            continue
        sequence = placed.sequence
        for position in {-1, *(target.position for target in sequence.targets)}:
            row = row_at(sequence.num_tokens + position)
            if row not in row_of:
                row_of[row] = len(logit_rows)
                logit_rows.append(row)
        last_rows.append(row_of[row_at(sequence.num_tokens - 1)])
        for target in sequence.targets:
            target_rows.append(row_of[row_at(sequence.num_tokens + target.position)])
            target_ids.append(target.token_id)

    return Batch(
        sequences=answered,
        input_ids=tensor(input_ids).unsqueeze(0),
        position_ids=tensor(position_ids).unsqueeze(0),
        segments=tuple(segments),
        layout=layout_of(tuple(spans), device),
        cache=cache,
        kept_rows=tensor(kept_rows) if kept_rows else None,
        kept_slots=tensor(kept_slots) if kept_rows else None,
        kv_shapes={},
        logit_rows=tensor(logit_rows),
        last_rows=tensor(last_rows),
        target_rows=tensor(target_rows),
        target_ids=tensor(target_ids),
    )


def _slots(block: int) -> range:
    return range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)


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
