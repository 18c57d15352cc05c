"""Hugging Face's attention call -> our packed attention. The batch comes through the model's keyword arguments."""

from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from loraplex.errors import UnsupportedModelError
from loraplex.model.kv_cache import KVCache
from loraplex.ops.attention import packed_attention
from loraplex.ops.layout import Layout

NAME = "loraplex"

# Arguments that models pass and that change nothing here.
_INERT = frozenset({"dropout", "is_causal", "use_cache", "position_ids", "output_attentions", "output_hidden_states"})


class PackedTokens(Protocol):
    """What attention needs to know of a batch. `kept_rows` [n] are the packed tokens whose K/V go to the cache's
    `kept_slots` [n]; the shape of each layer's K/V is noted in `kv_shapes`."""

    @property
    def layout(self) -> Layout: ...
    @property
    def cache(self) -> KVCache | None: ...
    @property
    def kept_rows(self) -> torch.Tensor | None: ...
    @property
    def kept_slots(self) -> torch.Tensor | None: ...
    @property
    def kv_shapes(self) -> dict[int, tuple[int, int]]: ...


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, G, T, D]
    value: torch.Tensor,  # [1, G, T, D]
    attention_mask: torch.Tensor | None,
    *,
    batch: PackedTokens,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # [1, T, H, D]
    assert attention_mask is None, "a mask was built for an attention that derives its own"
    for name, given in kwargs.items():
        if given is not None and name not in _INERT:
            raise UnsupportedModelError(
                type(module).__name__,
                f"its attention uses {name!r}, which is not supported",
                remedy="serve another base",
            )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer = module.layer_idx
    assert isinstance(layer, int)
    batch.kv_shapes[layer] = (k.shape[1], k.shape[2])
    if batch.cache is not None and batch.kept_rows is not None and batch.kept_slots is not None:
        batch.cache.write(layer, batch.kept_slots, k[batch.kept_rows], v[batch.kept_rows])
    output = packed_attention(
        q,
        k,
        v,
        batch.layout,
        cache=batch.cache.layer(layer) if batch.cache is not None else None,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, attention_forward)
