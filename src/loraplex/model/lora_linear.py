"""A linear layer with one update a slot, each at its own rank, for packed tokens sorted by slot."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.weights import LoRAWeights, SavedModule
from loraplex.model.fuse import PackedLinear

# Segments of at most so many tokens are computed together, if there are so many of one rank: then the calls cost more
# than the arithmetic. On a CPU it pays up to about 40 tokens and is slower at 128.
SHORT, FEW = 32, 4


class Segment(NamedTuple):
    """Consecutive packed tokens start ... end - 1 that share the adapter in `slot`."""

    slot: int
    start: int
    end: int


class Padded(NamedTuple):
    """Some segments as rows of equal length: [g, n] of packed tokens, and which of these g * n are real."""

    tokens: torch.Tensor  # [g * n] packed tokens; what is too short repeats its last one
    real: torch.Tensor  # [v] indices into the g * n
    targets: torch.Tensor  # [v] their packed tokens
    start: int | None  # where the segments begin if they follow each other and none is shorter than n


class Segments:
    """Of one step, sorted by slot; all layers see the same."""

    def __init__(self, segments: Iterable[Segment], device: torch.device) -> None:
        self.all = tuple(segments)
        self.are_short = tuple(end - start <= SHORT for _, start, end in self.all)
        self._device = device
        self._padded: dict[tuple[int, ...], Padded] = {}

    def padded(self, which: tuple[int, ...]) -> Padded:
        """Made once a step, whichever layer asks first."""
        if which not in self._padded:
            self._padded[which] = self._pad(which)
        return self._padded[which]

    def _pad(self, which: tuple[int, ...]) -> Padded:
        n = max(self.all[i].end - self.all[i].start for i in which)
        tokens: list[int] = []
        real: list[int] = []
        for row, i in enumerate(which):
            _, start, end = self.all[i]
            tokens += [min(start + column, end - 1) for column in range(n)]
            real += range(row * n, row * n + end - start)
        targets = [tokens[i] for i in real]
        start = self.all[which[0]].start
        is_even = tokens == list(range(start, start + len(tokens))) and len(real) == len(tokens)
        tensors = [torch.tensor(values, device=self._device) for values in (tokens, real, targets)]
        return Padded(tensors[0], tensors[1], tensors[2], start if is_even else None)


class ActiveSegments:
    """The segments of the step that runs now. A model's forward hands its layers only their input, so the runner that
    owns the model sets this one object, which the layers of that model share, before each step."""

    __slots__ = ("current",)

    def __init__(self) -> None:
        self.current: Segments | None = None  # None: nobody wants the layer's output


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What a slot makes of a layer: out = gain * out + shift + x @ lora_A.T @ lora_B.T, the scaling within lora_B.
    `saved` replaces the layer, `rows` the rows of its weight in `row_ids`."""

    lora_A: torch.Tensor | None = None  # [rank, in]
    lora_B: torch.Tensor | None = None  # [out, rank]
    gain: torch.Tensor | None = None  # [out]
    shift: torch.Tensor | None = None  # [out]
    saved: SavedModule | None = None
    row_ids: torch.Tensor | None = None  # [n]
    rows: torch.Tensor | None = None  # [n, in]
    plain_rank: int | None = field(init=False)  # where it is nothing but lora_A and lora_B; asked by every step

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
        if self.lora_A is not None and self.lora_B is not None:
            out.addmm_(x @ self.lora_A.T, self.lora_B.T)


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
            lora_B=self._placed(lora_B),
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
        short: dict[int, list[int]] = {}  # rank -> segments
        for i, (slot, start, end) in enumerate(segments.all):
            update = self.slots.get(slot)
            if update is None:
                continue
            if segments.are_short[i] and update.plain_rank is not None:
                short.setdefault(update.plain_rank, []).append(i)
            else:
                update.apply(tokens[start:end], out[start:end])
        for which in short.values():
            if len(which) >= FEW:
                self._apply_together(segments, tuple(which), tokens, out)
                continue
            for slot, start, end in (segments.all[i] for i in which):
                self.slots[slot].apply(tokens[start:end], out[start:end])
        return output

    def _apply_together(
        self, segments: Segments, which: tuple[int, ...], tokens: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Plain updates of one rank, in four or six calls however many they are."""
        updates = [self.slots[segments.all[i].slot] for i in which]
        lora_A = torch.stack([update.lora_A for update in updates if update.lora_A is not None])  # [g, rank, in]
        lora_B = torch.stack([update.lora_B for update in updates if update.lora_B is not None])  # [g, out, rank]
        padded = segments.padded(which)
        if padded.start is not None:
            rows = slice(padded.start, padded.start + len(padded.tokens))
            x, target = (packed[rows].unflatten(0, (len(which), -1)) for packed in (tokens, out))
            target.baddbmm_(torch.bmm(x, lora_A.mT), lora_B.mT)
            return
        x = tokens.index_select(0, padded.tokens).view(len(which), -1, tokens.shape[1])  # [g, n, in]
        delta = torch.bmm(torch.bmm(x, lora_A.mT), lora_B.mT).view(-1, out.shape[1])  # [g * n, out]
        out.index_add_(0, padded.targets, delta.index_select(0, padded.real))

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
        return tensor.to(self._device, self._dtype, copy=True).contiguous()


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


def _sum(one: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if one is None else one + other
