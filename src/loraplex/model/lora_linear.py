"""A linear layer with one update a slot, each at its own rank, for packed tokens. Those of a slot follow each other."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.weights import LoRAWeights, SavedModule
from loraplex.model.cuda_graphs import Graphs
from loraplex.model.fuse import PackedLinear

# Adapters are computed together where zeros that fill up the smaller ranks make it at most so many times the work.
MOST_FILLED_RANKS = 2


class Segment(NamedTuple):
    """Consecutive packed tokens start ... end - 1 that share the adapter in `slot`."""

    slot: int
    start: int
    end: int


class Group(NamedTuple):
    """Segments first ... last of a step, which are of one length and updated together, by `lora_A` and `lora_B_T`; or
    the one at `first`, by its `update`."""

    first: int
    last: int
    update: "Update | None" = None
    lora_A: torch.Tensor | None = None  # [g, rank, in], the smaller ranks filled up with zeros
    lora_B_T: torch.Tensor | None = None  # [g, rank, out]

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for one in (self.lora_A, self.lora_B_T) if one is not None)


class Segments:
    """Of one step; all layers see the same."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.all = tuple(segments)
        self.lengths = tuple(end - start for _, start, end in self.all)
        self.num_tokens = sum(self.lengths)
        # Of the layers that were asked, to be kept for steps of the same `key`; None: not to be kept.
        self.groups: dict[MultiLoRALinear, tuple[Group, ...]] | None = None
        # What was captured for steps of the same segments, and is to be; None: nothing is.
        self.graphs: Graphs | None = None

    @property
    def key(self) -> tuple[tuple[int, bool], ...]:
        """Steps of the same key have the same groups: slots, and whether the one before is as long."""
        before = (0, *self.lengths)
        return tuple((one.slot, n == m) for one, n, m in zip(self.all, self.lengths, before, strict=False))


class ActiveSegments:
    """The segments of the step that runs now. A model's forward hands its layers only their input, so the runner that
    owns the model sets this one object, which the layers of that model share, before each step."""

    __slots__ = ("current",)

    def __init__(self) -> None:
        self.current: Segments | None = None  # None: nobody wants the layer's output


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What a slot makes of a layer: out = gain * out + shift + x @ lora_A.T @ lora_B_T, the scaling within lora_B_T.
    `saved` replaces the layer, `rows` the rows of its weight in `row_ids`."""

    lora_A: torch.Tensor | None = None  # [rank, in]
    lora_B_T: torch.Tensor | None = None  # [rank, out]
    gain: torch.Tensor | None = None  # [out]
    shift: torch.Tensor | None = None  # [out]
    saved: SavedModule | None = None
    row_ids: torch.Tensor | None = None  # [n]
    rows: torch.Tensor | None = None  # [n, in]
    plain_rank: int | None = field(init=False)  # where it is nothing but lora_A and lora_B_T; asked by every step

    def __post_init__(self) -> None:
        is_plain = all(other is None for other in (self.gain, self.shift, self.saved, self.rows))
        object.__setattr__(self, "plain_rank", len(self.lora_A) if is_plain and self.lora_A is not None else None)

    def apply(self, x: torch.Tensor, out: torch.Tensor) -> None:  # [n, in], [n, out], changed in place
        if self.saved is not None:
            out.copy_(torch.nn.functional.linear(x, self.saved.weight, self.saved.bias))
        if self.rows is not None and self.row_ids is not None:
            out[:, self.row_ids] = x @ self.rows.T
        if self.gain is not None:
            out.mul_(self.gain)
        if self.shift is not None:
            out.add_(self.shift)
        if self.lora_A is not None and self.lora_B_T is not None:
            out.addmm_(x @ self.lora_A.T, self.lora_B_T)


class MultiLoRALinear(nn.Module):
    """base_layer(x), and for the tokens of each segment whose slot is set its update."""

    def __init__(self, base_layer: nn.Linear | PackedLinear | Conv1D, segments: ActiveSegments) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.segments = segments
        weight = base_layer.weight
        self._device, self._dtype = weight.device, weight.dtype
        self.out_features = base_layer.nf if isinstance(base_layer, Conv1D) else base_layer.out_features
        self.slots: dict[int, Update] = {}

    def set_slot(
        self,
        slot: int,
        lora: LoRAWeights | None = None,
        *,
        bias: torch.Tensor | None = None,
        saved: SavedModule | None = None,
        rows: tuple[tuple[int, ...], torch.Tensor] | None = None,
    ) -> None:
        """bias: [out] replaces the layer's own."""
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
        if own is not None and gain is not None:  # DoRA scales what the weight gives and not the bias
            shift = _sum(shift, own - gain * own)
        if bias is not None:
            shift = _sum(shift, bias.float() - (0.0 if own is None else own))
        self.slots[slot] = Update(
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
        self.slots.pop(slot, None)

    def is_active(self) -> bool:
        """Whether an adapter changes what this layer gives for the tokens that are computed now."""
        segments = self.segments.current
        return segments is None or any(slot in self.slots for slot, _, _ in segments.all)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """self(x) + residual [1, T, out], in one pass where no adapter does more than to add."""
        segments = self.segments.current
        if not isinstance(self.base_layer, PackedLinear) or segments is None:
            return self(x).add_(residual)  # type: ignore[no-any-return]
        updates = (self.slots.get(slot) for slot, _, _ in segments.all)
        if any(update is not None and update.plain_rank is None for update in updates):
            return self(x).add_(residual)  # type: ignore[no-any-return]
        return self._updated(x, self.base_layer.plus(x, residual), segments)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [1, T, in] -> [1, T, out]
        segments = self.segments.current
        if segments is None:
            return x.new_zeros(()).expand(*x.shape[:-1], self.out_features)
        return self._updated(x, self.base_layer(x), segments)

    def _updated(self, x: torch.Tensor, output: torch.Tensor, segments: Segments) -> torch.Tensor:
        tokens, out = x[0], output[0]
        for group in self._groups(segments):
            rows = slice(segments.all[group.first].start, segments.all[group.last].end)
            if group.update is not None:
                group.update.apply(tokens[rows], out[rows])
            elif group.lora_A is not None and group.lora_B_T is not None:
                by_adapter = (len(group.lora_A), -1)
                x_of, out_of = tokens[rows].unflatten(0, by_adapter), out[rows].unflatten(0, by_adapter)
                out_of.baddbmm_(torch.bmm(x_of, group.lora_A.mT), group.lora_B_T)
        return output

    def _groups(self, segments: Segments) -> tuple[Group, ...]:
        kept = segments.groups
        if kept is None:
            return tuple(self._make_groups(segments))
        if self not in kept:
            kept[self] = tuple(self._make_groups(segments))
        return kept[self]

    def _make_groups(self, segments: Segments) -> Iterator[Group]:
        updates: list[Update] = []  # of the segments before the i-th, with so many ranks
        most = total = 0
        for i, (segment, length) in enumerate(zip((*segments.all, None), (*segments.lengths, 0), strict=True)):
            update = None if segment is None else self.slots.get(segment.slot)
            rank = None if update is None else update.plain_rank
            if updates and (
                rank is None
                or length != segments.lengths[i - 1]
                or max(most, rank) * (len(updates) + 1) > MOST_FILLED_RANKS * (total + rank)
            ):
                yield _group(i - len(updates), updates)
                updates, most, total = [], 0, 0
            if update is not None and rank is not None:
                updates.append(update)
                most, total = max(most, rank), total + rank
            elif update is not None:
                yield Group(i, i, update)

    def _norms(self, scaled_B: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
        """[out] of the rows of W + scaling * B @ A."""
        weight = self.base_layer.weight.detach().float()
        if isinstance(self.base_layer, Conv1D):
            weight = weight.T
        norms: torch.Tensor = torch.linalg.norm(weight + scaled_B @ lora_A, dim=1)
        return norms

    def _placed(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else self._copied(tensor)

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, self._dtype, copy=True, memory_format=torch.contiguous_format)


def wrap_linears(model: nn.Module, modules: Iterable[str], segments: ActiveSegments) -> dict[str, MultiLoRALinear]:
    """Replace the named linear layers by MultiLoRALinear; those that are wrapped already are returned as they are."""
    wrapped = {}
    for path in modules:
        layer = model.get_submodule(path)
        if not isinstance(layer, MultiLoRALinear):
            assert isinstance(layer, nn.Linear | PackedLinear | Conv1D), f"{path} is a {type(layer).__name__}"
            layer = MultiLoRALinear(layer, segments)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
        wrapped[path] = layer
    return wrapped


def _group(first: int, updates: list[Update]) -> Group:
    if len(updates) == 1:
        return Group(first, first, updates[0])
    lora_A = [update.lora_A for update in updates if update.lora_A is not None]
    lora_B_T = [update.lora_B_T for update in updates if update.lora_B_T is not None]
    return Group(first, first + len(updates) - 1, lora_A=_stacked(lora_A), lora_B_T=_stacked(lora_B_T))


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    """[rank, n] each -> [g, largest rank, n]"""
    if len({len(tensor) for tensor in tensors}) == 1:
        return torch.stack(tensors)  # far faster
    return pad_sequence(tensors, batch_first=True)


def _sum(one: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if one is None else one + other
