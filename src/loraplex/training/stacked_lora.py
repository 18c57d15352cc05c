"""The LoRA of N adapters on one linear layer, trained together."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from loraplex.errors import UnsupportedModelError

MOST_FILLED = 1.5  # rows that are computed for one that is wanted


class Rows:
    """Says which rows of a pass each adapter changes; shared by all layers of a model, because a transformers model
    passes its layers nothing but their input."""

    def __init__(self) -> None:
        self.of_adapters: torch.Tensor | None = None  # [num_adapters, m], see `Packed.rows`; None: the base alone runs
        self.counts: tuple[int, ...] = ()  # [num_adapters] rows of each; they lie one behind the other
        self.num_tokens = 0

    @property
    def is_dense(self) -> bool:
        """Whether every adapter has as many rows, so that they are 0, 1, 2, …"""
        return self.of_adapters is not None and self.of_adapters.numel() == self.num_tokens

    @property
    def is_uneven(self) -> bool:
        """Whether filling up to the adapter with the most rows would cost more than a product for each adapter."""
        return self.of_adapters is not None and self.of_adapters.numel() > MOST_FILLED * self.num_tokens


class StackedLoRA(nn.Module):
    """A frozen linear layer with N trainable updates.

    lora_A: [N, rank, in], as PEFT initializes each; lora_B: [N, out, rank], zeros. Both in float32.
    """

    def __init__(self, base_layer: nn.Module, shape: tuple[int, int], rows: Rows, n: int, rank: int, scaling: float):
        """shape: (outputs, inputs). n: the number of adapters."""
        super().__init__()
        out, width = shape
        self.base_layer, self._rows, self.scaling = base_layer, rows, scaling
        device = next(base_layer.parameters()).device
        self.lora_A = nn.Parameter(torch.empty(n, rank, width, device=device))
        self.lora_B = nn.Parameter(torch.zeros(n, out, rank, device=device))
        for one in self.lora_A:
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))

    @property
    def weight(self) -> torch.Tensor:
        weight = self.base_layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [1, T, in] -> [1, T, out]
        y: torch.Tensor = self.base_layer(x)
        rows = self._rows.of_adapters
        if rows is None:
            return y
        n, m = rows.shape
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != self._rows.num_tokens:
            raise UnsupportedModelError(
                "--targets",
                "one of the layers does not see every token: it belongs to an expert, or is shared in another way",
                remedy="name attention's layers, such as q_proj,k_proj,v_proj,o_proj",
            )
        if self._rows.is_uneven:
            return y + self._one_by_one(flat).view_as(y)
        own = flat if self._rows.is_dense else F.pad(flat, (0, 0, 0, 1))[rows.flatten()]
        # Scaled while it is small: a pass over [T, out] would take as long as the product.
        down = (own.view(n, m, -1) @ self.lora_A.to(x.dtype).transpose(1, 2)) * self.scaling
        up = self.lora_B.to(x.dtype).transpose(1, 2)
        if self._rows.is_dense:
            return torch.baddbmm(y.view(n, m, -1), down, up).view_as(y)
        update = (down @ up).flatten(0, 1)
        scattered = update.new_zeros(len(flat) + 1, update.shape[-1]).index_copy(0, rows.flatten(), update)
        return y + scattered[:-1].view_as(y)

    def _one_by_one(self, x: torch.Tensor) -> torch.Tensor:  # [T, in] -> [T, out]
        """Return the update of each adapter for its own rows."""
        adapters = zip(
            x.split(self._rows.counts), self.lora_A.to(x.dtype).unbind(), self.lora_B.to(x.dtype).unbind(), strict=True
        )
        return torch.cat([F.linear(F.linear(own, down) * self.scaling, up) for own, down, up in adapters if len(own)])
