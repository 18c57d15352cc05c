"""The keys and values of the blocks, one pair of tensors per layer. The block pool knows which block holds what."""

from collections.abc import Sequence
from typing import Any

import torch

Shape = tuple[int, int]  # (num_kv_heads, head_dim)


class KVCache:
    """K/V by cache slot, one per token: block b is cache slots b * block_size ... (b + 1) * block_size - 1."""

    def __init__(self, shapes: Sequence[Shape], num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        """shapes: one per layer, in order. num_slots: tokens that the cache holds."""
        self._layers = [
            tuple(torch.empty((num_slots, *shape), dtype=dtype, device=device) for _ in range(2)) for shape in shapes
        ]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values, each [num_slots, num_kv_heads, head_dim]."""
        keys, values = self._layers[index]
        return keys, values

    def write(self, index: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write a layer's keys and values, each [n, num_kv_heads, head_dim], into cache slots [n]."""
        for cached, new in zip(self._layers[index], (key, value), strict=True):
            cached.index_copy_(0, slots, new)


def kv_shapes(config: Any) -> tuple[Shape, ...]:
    """Return (num_kv_heads, head_dim) of each layer, from the base's PreTrainedConfig."""
    num_heads = int(config.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    return ((num_kv_heads, head_dim(config)),) * int(config.num_hidden_layers)


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_bytes(shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values over all layers."""
    return sum(2 * heads * dim * dtype.itemsize for heads, dim in shapes)
