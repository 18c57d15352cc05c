"""Sequences -> the tensors of one packed step."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from loraplex.engine.sequence import Sequence
from loraplex.model.lora_linear import Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """T packed tokens of S sequences, sorted by slot; L rows whose logits are wanted; N targets.

    The last token of every sequence is among the rows: its distribution gives the top token.
    """

    sequences: tuple[Sequence, ...]
    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T]
    seqlens: tuple[int, ...]  # S
    segments: tuple[Segment, ...]
    logit_rows: torch.Tensor  # [L] packed token indices
    last_rows: torch.Tensor  # [S] indices into logit_rows
    target_rows: torch.Tensor  # [N] indices into logit_rows
    target_ids: torch.Tensor  # [N] token ids


def pack(sequences: Seq[Sequence], device: torch.device) -> Batch:
    """Sort by slot, so that an adapter's tokens are one contiguous segment, and lay out without padding."""
    ordered = sorted(sequences, key=lambda sequence: sequence.slot)
    input_ids: list[int] = []
    position_ids: list[int] = []
    segments: list[Segment] = []
    logit_rows: list[int] = []
    last_rows: list[int] = []
    target_rows: list[int] = []
    target_ids: list[int] = []
    for sequence in ordered:
        start = len(input_ids)
        input_ids.extend(sequence.token_ids)
        position_ids.extend(range(sequence.num_tokens))
        end = len(input_ids)
        if segments and segments[-1].slot == sequence.slot:
            segments[-1] = segments[-1]._replace(end=end)
        else:
            segments.append(Segment(sequence.slot, start, end))
        row_of_position: dict[int, int] = {}
        for position in sorted({-1, *(target.position for target in sequence.targets)}):
            row_of_position[position] = len(logit_rows)
            logit_rows.append(end + position)
        last_rows.append(row_of_position[-1])
        for target in sequence.targets:
            target_rows.append(row_of_position[target.position])
            target_ids.append(target.token_id)

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Batch(
        sequences=tuple(ordered),
        input_ids=tensor(input_ids).unsqueeze(0),
        position_ids=tensor(position_ids).unsqueeze(0),
        seqlens=tuple(sequence.num_tokens for sequence in ordered),
        segments=tuple(segments),
        logit_rows=tensor(logit_rows),
        last_rows=tensor(last_rows),
        target_rows=tensor(target_rows),
        target_ids=tensor(target_ids),
    )
