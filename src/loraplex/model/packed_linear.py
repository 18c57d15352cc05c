"""A linear layer whose weight is stored in the format in which a CPU computes bfloat16."""

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A bfloat16 linear layer on a CPU. Its weight is converted once to the blocked format in which oneDNN computes;
    F.linear would convert the weight at every call."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        # The format is the same for any number of rows: measured for 1 ... 2048.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 2048)

    @property
    def weight(self) -> torch.Tensor:
        """The weight [out, in], unpacked at each call."""
        weight: torch.Tensor = self._packed.to_dense()
        return weight

    def forward(self, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
        """Return activation(x @ weight.T + bias). activation: a name of oneDNN's ("swish" is SiLU)."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, activation, [], "")
        return output

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Return self(x) * factor, in one pass over memory."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, factor, self._packed, self.bias, "mul")
        return output

    def plus(self, x: torch.Tensor, summand: torch.Tensor) -> torch.Tensor:
        """Return self(x) + summand, in one pass over memory."""
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
    """Return the layer, packed if this CPU computes packed layers."""
    return PackedLinear(layer) if can_pack(layer) else layer
