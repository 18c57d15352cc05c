"""The last decoder layer for the wanted tokens only: of all others it computes nothing but keys and values."""

import types
from typing import Any, Protocol

import torch
from torch import nn

from loraplex.model.attention import CapturedKV, PackedTokens
from loraplex.model.decoder_layer import FusedLayer
from loraplex.model.fuse import PackedLinear
from loraplex.model.lora_linear import ActiveSegments, Segments, wrap_linears
from loraplex.ops.layout import Layout


class PrunedTokens(PackedTokens, Protocol):
    """`logit_rows` [L] are the packed tokens whose logits are wanted; `last_layout` and `last_segments` say of these L
    what `layout` and the segments say of all."""

    @property
    def logit_rows(self) -> torch.Tensor: ...
    @property
    def last_layout(self) -> Layout: ...
    @property
    def last_segments(self) -> Segments: ...


def prune_last_layer(model: nn.Module, segments: ActiveSegments) -> bool:
    """Make the model's output [1, L, hidden] for the batch's `logit_rows`. False, and nothing changed, where its last
    layer is not built like Llama's: a norm, an attention with projections of its own, and what follows per token.

    First pass: norm and attention over all tokens, with the query and output projections left out; only K/V come of
    it. Second pass: the whole layer over the wanted tokens, which attend to these K/V.
    """
    found = [(path, module) for path, module in model.named_modules() if path.endswith("layers")]
    if len(found) != 1 or not isinstance(found[0][1], nn.ModuleList):
        return False
    path, layers = found[0]
    layer: Any = layers[-1]
    if isinstance(layer.forward, FusedLayer):
        layer.forward.is_last = True
        return True
    attention = getattr(layer, "self_attn", None)
    if not hasattr(layer, "input_layernorm") or not hasattr(attention, "o_proj"):
        return False
    prefix = f"{path}.{len(layers) - 1}"
    linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear | PackedLinear)]
    main = [name for name in linears if name.rpartition(".")[2] in ("k_proj", "v_proj", "qkv_proj")]
    if not main:
        return False
    last = ActiveSegments()
    wrap_linears(model, [f"{prefix}.{name}" for name in main], segments)
    wrap_linears(model, [f"{prefix}.{name}" for name in linears if name not in main], last)
    whole = layer.forward

    def forward(self: nn.Module, hidden_states: torch.Tensor, *, batch: PrunedTokens, **kwargs: Any) -> torch.Tensor:
        captured = CapturedKV(batch)
        last.current = None
        self.self_attn(hidden_states=self.input_layernorm(hidden_states), batch=captured, **kwargs)  # type: ignore[operator]
        rows = batch.logit_rows
        last.current = segments.current = batch.last_segments
        for name in ("position_embeddings", "position_ids"):
            kwargs[name] = _rows(kwargs.get(name), rows)
        output: torch.Tensor = whole(hidden_states[:, rows], batch=captured.for_rows(batch.last_layout), **kwargs)
        return output

    layer.forward = types.MethodType(forward, layer)
    return True


def _rows(value: Any, rows: torch.Tensor) -> Any:
    """Of a [1, T, ...] tensor, or each of several."""
    if isinstance(value, tuple):
        return tuple(one[:, rows] for one in value)
    return None if value is None else value[:, rows]
