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


class CapturedKV:
    """Stands for a batch twice: first it takes the K/V of all tokens, then some of them attend to these."""

    def __init__(self, batch: PackedTokens) -> None:
        self.batch = batch
        self.layout: Layout | None = None
        self.key = self.value = torch.empty(0)

    def for_rows(self, layout: Layout) -> "CapturedKV":
        self.layout = layout
        return self


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, G, T, D]
    value: torch.Tensor,  # [1, G, T, D]
    attention_mask: torch.Tensor | None,
    *,
    batch: PackedTokens | CapturedKV,
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
    captured = batch if isinstance(batch, CapturedKV) else None
    tokens = batch.batch if isinstance(batch, CapturedKV) else batch
    layout = batch.layout
    if captured is not None and layout is not None:
        k, v = captured.key, captured.value
    else:
        tokens.kv_shapes[layer] = (k.shape[1], k.shape[2])
        if tokens.cache is not None and tokens.kept_rows is not None and tokens.kept_slots is not None:
            tokens.cache.write(layer, tokens.kept_slots, k[tokens.kept_rows], v[tokens.kept_rows])
    if layout is None:
        assert captured is not None
        captured.key, captured.value = k, v
        return query.new_zeros(()).expand(1, query.shape[2], query.shape[1], query.shape[3]), None
    output = packed_attention(
        q,
        k,
        v,
        layout,
        cache=tokens.cache.layer(layer) if tokens.cache is not None else None,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, attention_forward)
