"""A linear layer whose weight lies in the format that a CPU computes bfloat16 in."""

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 on a CPU, its weight once in the blocked format that oneDNN computes in. F.linear
    would bring the weight into that format at every call."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        # The blocks are the same for any number of rows: measured for 1 ... 2048.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 2048)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], unpacked at each call."""
        weight: torch.Tensor = self._packed.to_dense()
        return weight

    def forward(self, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
        """activation: by oneDNN's name ("swish" is SiLU), computed together with the product."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, activation, [], "")
        return output

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """self(x) * factor, in one pass over memory."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, factor, self._packed, self.bias, "mul")
        return output

    def plus(self, x: torch.Tensor, summand: torch.Tensor) -> torch.Tensor:
        """self(x) + summand, in one pass over memory."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, summand, self._packed, self.bias, "add")
        return output


def can_pack(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx512_bf16_supported()
    )


def packed(layer: nn.Linear) -> nn.Linear | PackedLinear:
    """The layer, packed where that is faster."""
    return PackedLinear(layer) if can_pack(layer) else layer
