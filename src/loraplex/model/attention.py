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


class Probe:
    """Stands for a batch while a layer is tried out: notes what attention is asked, and answers with the queries."""

    layout: Any = None

    def __init__(self) -> None:
        self.asked: list[torch.Tensor] = []  # query, key, value, each [T, heads, D]
        self.settings: dict[str, Any] = {}


def attend(
    layer: int,
    query: torch.Tensor,  # [T, H, D], or [L, H, D] where the layout's spans name their rows
    key: torch.Tensor,  # [T, G, D]
    value: torch.Tensor,  # [T, G, D]
    layout: Layout,
    batch: PackedTokens | Probe,
    **settings: Any,
) -> torch.Tensor:  # like the query
    """Keeps the keys and values that are to be kept, and computes the attention."""
    if isinstance(batch, Probe):
        batch.asked, batch.settings = [query, key, value], settings
        return query
    batch.kv_shapes[layer] = (key.shape[1], key.shape[2])
    if batch.cache is not None and batch.kept_rows is not None and batch.kept_slots is not None:
        batch.cache.write(layer, batch.kept_slots, key[batch.kept_rows], value[batch.kept_rows])
    cache = None if batch.cache is None else batch.cache.layer(layer)
    return packed_attention(query, key, value, layout, cache=cache, **settings)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, G, T, D]
    value: torch.Tensor,  # [1, G, T, D]
    attention_mask: torch.Tensor | None,
    *,
    batch: PackedTokens | CapturedKV | Probe,
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
    settings = {"scaling": scaling, "window": sliding_window, "softcap": softcap}
    layer = module.layer_idx
    assert isinstance(layer, int)
    if not isinstance(batch, CapturedKV):
        return attend(layer, q, k, v, batch.layout, batch, **settings).unsqueeze(0), None
    if batch.layout is None:
        batch.key, batch.value = k, v
        return query.new_zeros(()).expand(1, query.shape[2], query.shape[1], query.shape[3]), None
    return attend(layer, q, batch.key, batch.value, batch.layout, batch.batch, **settings).unsqueeze(0), None


AttentionInterface.register(NAME, attention_forward)
