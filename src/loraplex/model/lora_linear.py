"""A linear layer with one low-rank update a slot, each at its own rank, for packed tokens sorted by slot."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from loraplex.adapters.weights import LoRAWeights
from loraplex.model.fuse import PackedLinear


class Segment(NamedTuple):
    """Consecutive packed tokens start ... end - 1 that share the adapter in `slot`."""

    slot: int
    start: int
    end: int


class ActiveSegments:
    """The segments of the step that runs now. A model's forward hands its linear layers only their input, so the runner
    that owns the model sets this one object, which all layers of that model share, before each step."""

    __slots__ = ("current",)

    def __init__(self) -> None:
        self.current: tuple[Segment, ...] | None = ()  # None: nobody wants the layer's output


class MultiLoRALinear(nn.Module):
    """base_layer(x), plus scaling * lora_B @ lora_A @ x for the tokens of each segment whose slot is set."""

    def __init__(self, base_layer: nn.Linear | PackedLinear, segments: ActiveSegments) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.segments = segments
        weight = base_layer.weight
        self._device, self._dtype = weight.device, weight.dtype
        self.slots: dict[
            int, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # slot -> lora_A.T [in, r], (scaling * lora_B).T [r, out]

    def set_slot(self, slot: int, weights: LoRAWeights) -> None:
        # Scaled before the cast: one rounding instead of two in bf16.
        lora_B = weights.lora_B.float() * weights.scaling
        self.slots[slot] = (
            weights.lora_A.to(self._device, self._dtype, copy=True).T,
            lora_B.to(self._device, self._dtype).T,
        )

    def clear_slot(self, slot: int) -> None:
        self.slots.pop(slot, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [1, T, in] -> [1, T, out]
        if self.segments.current is None:
            return x.new_zeros(()).expand(*x.shape[:-1], self.base_layer.out_features)
        output: torch.Tensor = self.base_layer(x)
        tokens, out = x[0], output[0]
        for slot, start, end in self.segments.current:
            update = self.slots.get(slot)
            if update is not None:
                lora_A, lora_B = update
                out[start:end].addmm_(tokens[start:end] @ lora_A, lora_B)
        return output


def wrap_linears(model: nn.Module, modules: Iterable[str], segments: ActiveSegments) -> dict[str, MultiLoRALinear]:
    """Replace the named linear layers by MultiLoRALinear; those that are wrapped already are returned as they are."""
    wrapped = {}
    for path in modules:
        layer = model.get_submodule(path)
        if not isinstance(layer, MultiLoRALinear):
            assert isinstance(layer, nn.Linear | PackedLinear), f"{path} is a {type(layer).__name__}"
            layer = MultiLoRALinear(layer, segments)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
        wrapped[path] = layer
    return wrapped
