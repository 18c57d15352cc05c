"""A linear layer with one update per slot, each at its own rank, for packed tokens sorted by slot."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.weights import LoRAWeights, SavedModule
from loraplex.model.inputs import Segments
from loraplex.model.packed_linear import PackedLinear

# Adapters are stacked if padding the smaller ranks with zeros makes the work at most MAX_RANK_PADDING times as large.
MAX_RANK_PADDING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearUpdate:
    """A slot's change of the layer: out = gain * out + shift + x @ lora_A.T @ lora_B_T; lora_B_T includes the scaling.
    `saved` replaces the whole layer, `rows` the rows `row_ids` of its weight."""

    lora_A: torch.Tensor | None = None  # [rank, in]
    lora_B_T: torch.Tensor | None = None  # [rank, out]
    gain: torch.Tensor | None = None  # [out]
    shift: torch.Tensor | None = None  # [out]
    saved: SavedModule | None = None
    row_ids: torch.Tensor | None = None  # [n]
    rows: torch.Tensor | None = None  # [n, in]
    plain_rank: int | None = field(init=False)  # the rank of an update of lora_A and lora_B_T alone; kept for speed

    def __post_init__(self) -> None:
        is_plain = all(other is None for other in (self.gain, self.shift, self.saved, self.rows))
        object.__setattr__(self, "plain_rank", len(self.lora_A) if is_plain and self.lora_A is not None else None)

    def apply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Change the layer's output `out` [n, out] for its input `x` [n, in] in place."""
        if self.saved is not None:
            out.copy_(F.linear(x, self.saved.weight, self.saved.bias))
        if self.rows is not None and self.row_ids is not None:
            out[:, self.row_ids] = x @ self.rows.T
        if self.gain is not None:
            out.mul_(self.gain)
        if self.shift is not None:
            out.add_(self.shift)
        if self.lora_A is not None and self.lora_B_T is not None:
            out.addmm_(x @ self.lora_A.T, self.lora_B_T)


class StackedUpdate(NamedTuple):
    """A stack: the updates of the segments first ... last of a step, which have one length, as one batched product of
    `lora_A` and `lora_B_T`. A single segment has its `update` instead."""

    first: int
    last: int
    update: LinearUpdate | None = None
    lora_A: torch.Tensor | None = None  # [g, rank, in], the smaller ranks padded with zeros
    lora_B_T: torch.Tensor | None = None  # [g, rank, out]

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for one in (self.lora_A, self.lora_B_T) if one is not None)


class LoRALinear:
    """base_layer(x), changed by its update for each segment whose slot is set. x: [T, in]; output: [T, out]."""

    def __init__(self, base_layer: nn.Linear | PackedLinear | Conv1D) -> None:
        self.base_layer = base_layer
        weight = base_layer.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._slots: dict[int, LinearUpdate] = {}

    def set_slot(
        self,
        slot: int,
        lora: LoRAWeights | None = None,
        *,
        bias: torch.Tensor | None = None,
        saved: SavedModule | None = None,
        rows: tuple[tuple[int, ...], torch.Tensor] | None = None,
    ) -> None:
        """Set the update of a slot. bias: [out], replaces the layer's own. rows: token ids, and the rows that replace
        the weight's rows of these tokens."""
        lora_A = lora_B = gain = shift = None
        if lora is not None:
            # Scaled before the cast: one rounding instead of two in bf16.
            lora_A, scaled_B = lora.lora_A.float(), lora.lora_B.float() * lora.scaling
            if lora.magnitude is not None:
                gain = lora.magnitude.float() / self._norms(scaled_B.to(self._device), lora_A.to(self._device)).cpu()
                scaled_B = gain[:, None] * scaled_B
            lora_B = scaled_B
            if lora.lora_bias is not None:
                shift = lora.lora_bias.float() * lora.scaling
        own = None if self.base_layer.bias is None else self.base_layer.bias.detach().float().cpu()
        if own is not None and gain is not None:  # DoRA scales the product and not the bias
            shift = _sum(shift, own - gain * own)
        if bias is not None:
            shift = _sum(shift, bias.float() - (0.0 if own is None else own))
        self._slots[slot] = LinearUpdate(
            lora_A=self._placed(lora_A),
            lora_B_T=self._placed(None if lora_B is None else lora_B.T),
            gain=self._placed(gain),
            shift=self._placed(shift),
            saved=None
            if saved is None
            else SavedModule(weight=self._copied(saved.weight), bias=self._placed(saved.bias)),
            row_ids=None if rows is None else torch.tensor(rows[0], device=self._device),
            rows=None if rows is None else self._copied(rows[1]),
        )

    def clear_slot(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def is_active(self, segments: Segments) -> bool:
        """Whether an adapter changes the layer's output for these segments."""
        return bool(self._slots) and any(slot in self._slots for slot, _, _ in segments.all)

    def __call__(self, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        return self._updated(x, self.base_layer(x), segments)

    def plus(self, x: torch.Tensor, residual: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Return self(x) + residual [T, out], in one pass over memory if the layer is packed and every update only
        adds."""
        layer = self.base_layer
        if isinstance(layer, PackedLinear) and all(
            update is None or update.plain_rank is not None
            for update in (self._slots.get(slot) for slot, _, _ in segments.all)
        ):
            return self._updated(x, layer.plus(x, residual), segments)
        return self(x, segments).add_(residual)

    def _updated(self, x: torch.Tensor, out: torch.Tensor, segments: Segments) -> torch.Tensor:
        for stacked in self._stacked(segments):
            rows = slice(segments.all[stacked.first].start, segments.all[stacked.last].end)
            if stacked.update is not None:
                stacked.update.apply(x[rows], out[rows])
            elif stacked.lora_A is not None and stacked.lora_B_T is not None:
                by_adapter = (len(stacked.lora_A), -1)
                x_of, out_of = x[rows].unflatten(0, by_adapter), out[rows].unflatten(0, by_adapter)
                out_of.baddbmm_(torch.bmm(x_of, stacked.lora_A.mT), stacked.lora_B_T)
        return out

    def _stacked(self, segments: Segments) -> tuple[StackedUpdate, ...]:
        if not self._slots:
            return ()
        memo = segments.stacked
        if memo is None:
            return tuple(self._stack(segments))
        if self not in memo:
            memo[self] = tuple(self._stack(segments))
        return memo[self]

    def _stack(self, segments: Segments) -> Iterator[StackedUpdate]:
        updates: list[LinearUpdate] = []  # of the segments before segment i, to be stacked
        largest = total = 0  # of the ranks of `updates`
        for i, (segment, length) in enumerate(zip((*segments.all, None), (*segments.lengths, 0), strict=True)):
            update = None if segment is None else self._slots.get(segment.slot)
            rank = None if update is None else update.plain_rank
            if updates and (
                rank is None
                or length != segments.lengths[i - 1]
                or max(largest, rank) * (len(updates) + 1) > MAX_RANK_PADDING * (total + rank)
            ):
                yield _stacked_update(i - len(updates), updates)
                updates, largest, total = [], 0, 0
            if update is not None and rank is not None:
                updates.append(update)
                largest, total = max(largest, rank), total + rank
            elif update is not None:
                yield StackedUpdate(i, i, update)

    def _norms(self, scaled_B: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
        """Return the norms [out] of the rows of W + scaling * B @ A."""
        weight = self.base_layer.weight.detach().float()
        if isinstance(self.base_layer, Conv1D):
            weight = weight.T
        norms: torch.Tensor = torch.linalg.norm(weight + scaled_B @ lora_A, dim=1)
        return norms

    def _placed(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else self._copied(tensor)

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype, copy=True, memory_format=torch.contiguous_format)


def _stacked_update(first: int, updates: list[LinearUpdate]) -> StackedUpdate:
    if len(updates) == 1:
        return StackedUpdate(first, first, updates[0])
    lora_A = [update.lora_A for update in updates if update.lora_A is not None]
    lora_B_T = [update.lora_B_T for update in updates if update.lora_B_T is not None]
    last = first + len(updates) - 1
    return StackedUpdate(first, last, lora_A=_padded_stack(lora_A), lora_B_T=_padded_stack(lora_B_T))


def _padded_stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Stack tensors [rank, n] into [g, largest rank, n], padded with zeros."""
    if len({len(tensor) for tensor in tensors}) == 1:
        return torch.stack(tensors)  # much faster than padding
    return pad_sequence(tensors, batch_first=True)


def _sum(one: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if one is None else one + other
