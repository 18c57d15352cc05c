"""The same layers with fewer passes over memory: norms in one kernel, weights in the format that a CPU computes in."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 on a CPU, its weight once in the blocked format that oneDNN computes in. F.linear
    would bring the weight into that format at every call."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        # Blocked alike for any number of rows: measured for 1 ... 2048.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 2048)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], unpacked at each call."""
        weight: torch.Tensor = self._packed.to_dense()
        return weight

    def forward(self, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
        """activation: as oneDNN calls it, computed with the product."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, activation, [], "")
        return output

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """self(x) * factor, in one pass."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, factor, self._packed, self.bias, "mul")
        return output

    def plus(self, x: torch.Tensor, summand: torch.Tensor) -> torch.Tensor:
        """self(x) + summand, in one pass."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, summand, self._packed, self.bias, "add")
        return output


def fuse(model: nn.Module) -> None:
    """Change what `model` is made of, not what it computes: a norm is replaced only where a probe shows that its
    replacement gives the same. Call it before anything wraps the layers."""
    for module in list(model.modules()):
        forward = _fused_norm(module)
        if forward is not None:
            module.forward = forward
    head = getattr(model, "get_output_embeddings", lambda: None)()  # may share its weight with the embeddings
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if layer is not head and can_pack(layer):
                setattr(module, name, PackedLinear(layer))  # type: ignore[arg-type]


def can_pack(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx512_bf16_supported()
    )


def _fused_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """For an RMS norm in one of transformers' two spellings: one kernel, which rounds once, in place of six."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, torch.Tensor) or eps is None:
        return None
    shape, one_plus_weight = weight.shape, 1.0 + weight.detach().float()

    def llama(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bfloat16 and not x.is_cuda:
            return _norm_by_rows(x, eps).mul_(module.weight)
        return F.rms_norm(x, shape, module.weight, eps)

    def gemma(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), shape, one_plus_weight, eps).type_as(x)

    # In the weight's own dtype, whose rounding the tolerance allows; a norm that means something else is far off.
    probe = torch.linspace(-2, 3, 3 * weight.numel(), device=weight.device).view(3, -1).to(weight.dtype)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    for forward in (llama, gemma):
        if weight.ndim == 1 and torch.allclose(module(probe), forward(probe), tolerance, tolerance):
            return forward
    return None


def _norm_by_rows(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) over the last dimension. For bfloat16 on a CPU F.rms_norm is six passes over float32
    copies. The kernel that reads and writes bfloat16 and scales in float32 is batch norm's, with rows as channels."""
    rows = x.reshape(1, -1, x.shape[-1])
    squares = torch.linalg.vector_norm(rows[0], dim=-1, dtype=torch.float32).square_().div_(x.shape[-1])
    mean = torch.zeros_like(squares)
    return F.batch_norm(rows, mean, squares, eps=eps).view(x.shape)
