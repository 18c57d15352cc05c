"""Keys and values of the blocks, one pair of tensors a layer. Which block holds what is the block pool's matter."""

from collections.abc import Mapping

import torch


class KVCache:
    """K/V by token slot: block b holds slots b * block_size ... (b + 1) * block_size - 1."""

    def __init__(
        self, shapes: Mapping[int, tuple[int, int]], num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """shapes: layer index -> (num_kv_heads, head_dim)."""
        self._layers = {
            layer: tuple(torch.empty((num_slots, *shape), dtype=dtype, device=device) for _ in range(2))
            for layer, shape in shapes.items()
        }

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [num_slots, num_kv_heads, head_dim]."""
        keys, values = self._layers[index]
        return keys, values

    def write(self, index: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """slots: [n]; key, value: [n, num_kv_heads, head_dim]."""
        for cached, new in zip(self._layers[index], (key, value), strict=True):
            cached.index_copy_(0, slots, new)


def slot_bytes(shapes: Mapping[int, tuple[int, int]], dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    return sum(2 * heads * head_dim * dtype.itemsize for heads, head_dim in shapes.values())
