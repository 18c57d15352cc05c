"""A decoder layer that is built like Llama's, in fewer passes over memory than its modules make one by one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loraplex.model.attention import Probe, attend
from loraplex.model.cuda_graphs import Piece, PieceRunner, Tensors
from loraplex.model.fuse import PackedLinear
from loraplex.model.lora_linear import ActiveSegments, MultiLoRALinear

# All built alike: norm, attention, sum, norm, gated MLP, sum.
FUSED = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


class FusedLayer:
    """Computes what `layer` computes, by its modules."""

    def __init__(self, layer: Any, settings: dict[str, Any]) -> None:
        self.layer, self.settings = layer, settings
        self.is_last = False
        self.segments = ActiveSegments()
        self.pieces: PieceRunner | None = None  # None: nothing is captured

    def __call__(
        self,
        hidden_states: torch.Tensor,  # [1, T, hidden]
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        batch: Any,
        **kwargs: Any,
    ) -> torch.Tensor:  # [1, T, hidden], of the last layer [1, L, hidden]
        cos, sin = position_embeddings
        before = self._run(self._before, hidden_states=hidden_states, cos=cos, sin=sin)
        query, layout = before["query"], batch.layout
        if self.is_last:  # of all other tokens nothing but keys and values is wanted
            rows, layout, self.segments.current = batch.logit_rows, batch.last_layout, batch.last_segments
            hidden_states, query = hidden_states[:, rows], rotated(query[rows], cos[0, rows], sin[0, rows])
        index = self.layer.self_attn.layer_idx
        attended = attend(index, query, before["key"], before["value"], layout, batch, **self.settings)
        return self._run(self._after, attended=attended, hidden_states=hidden_states)["hidden_states"]

    def _run(self, piece: Piece, **inputs: torch.Tensor) -> Tensors:
        segments = self.segments.current
        if self.pieces is None or self.is_last or segments is None or segments.graphs is None:
            return piece(**inputs)
        return self.pieces.run(segments.graphs, piece, segments.num_tokens, **inputs)

    def _before(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
        """What attention is asked: query, key, value, each [T, heads, D]."""
        attention = self.layer.self_attn
        x = self.layer.input_layernorm(hidden_states)
        query, key, value = (
            projection(x)[0].unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        if not self.is_last:
            query = rotated(query, cos[0], sin[0])
        return {"query": query, "key": rotated(key, cos[0], sin[0]), "value": value}

    def _after(self, attended: torch.Tensor, hidden_states: torch.Tensor) -> Tensors:
        """What the layer gives."""
        hidden_states = plus(self.layer.self_attn.o_proj, attended.flatten(1)[None], hidden_states)
        return {"hidden_states": plus(self.layer.mlp.down_proj, self._gated(hidden_states), hidden_states)}

    def _gated(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the MLP projects down."""
        x = self.layer.post_attention_layernorm(hidden_states)
        gate, up = bare(self.layer.mlp.gate_proj), bare(self.layer.mlp.up_proj)
        if isinstance(gate, PackedLinear) and isinstance(up, PackedLinear):
            return up.times(x, gate(x, "swish"))
        return F.silu(gate(x), inplace=True).mul_(up(x))


def bare(layer: nn.Module) -> nn.Module:
    """The layer itself, without its adapters where none of them acts on the tokens that are computed now."""
    return layer.base_layer if isinstance(layer, MultiLoRALinear) and not layer.is_active() else layer


def plus(layer: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """layer(x) + residual."""
    if isinstance(layer, MultiLoRALinear | PackedLinear):
        return layer.plus(x, residual)
    return layer(x).add_(residual)  # type: ignore[no-any-return]


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + rotate_half(x) * sin, without copies of x's halves. x: [n, heads, D]; cos, sin: [n, D]."""
    half, output = x.shape[-1] // 2, torch.empty_like(x)
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos[..., :half], out=output[..., :half]).addcmul_(second, sin[..., :half], value=-1)
    torch.mul(second, cos[..., half:], out=output[..., half:]).addcmul_(first, sin[..., half:])
    return output


def fuse_layers(model: nn.Module) -> None:
    """Replace the forward of the layers in FUSED where a probe shows that it computes the same. Call it before
    anything wraps the layers' parts."""
    for layer in list(model.modules()):
        if type(layer).__name__ in FUSED:
            fused = _fused(layer)
            if fused is not None:
                layer.forward = fused


def _fused(layer: Any) -> FusedLayer | None:
    weight = layer.input_layernorm.weight
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, 5, *shape, generator=generator).to(weight.device, weight.dtype)

    # Small, so that what the layer adds is not lost beside it; the norms make it large again.
    hidden = random(len(weight)) / 64
    rotary = random(layer.self_attn.head_dim), random(layer.self_attn.head_dim)
    own, ours = Probe(), Probe()
    expected = layer(hidden, position_embeddings=rotary, attention_mask=None, batch=own)
    fused = FusedLayer(layer, own.settings)
    actual = fused(hidden, position_embeddings=rotary, batch=ours)
    pairs = [*zip(own.asked, ours.asked, strict=True), (expected - hidden, actual - hidden)]
    x = hidden * 64
    pairs.append((layer.mlp.act_fn(x), F.silu(x)))
    tolerance = 4 * torch.finfo(weight.dtype).eps
    same = all(bool((a - b).abs().max() <= tolerance * a.abs().max()) for a, b in pairs)
    return fused if same else None
