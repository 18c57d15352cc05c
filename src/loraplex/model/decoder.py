"""Our own decoder for bases that are built like Llama: Llama, Mistral, Qwen2 and Qwen3."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loraplex.adapters.weights import AdapterWeights, BaseLayers
from loraplex.errors import UnsupportedModelError
from loraplex.machine import budget_bytes
from loraplex.model.adapted_layers import AdaptedLayer, AdaptedLayers
from loraplex.model.base_weights import Weights
from loraplex.model.graphs import Capture, Piece, PieceRunner, Tensors
from loraplex.model.inputs import ModelInputs, ModelOutput, Segments
from loraplex.model.kv_cache import KVCache, head_dim, kv_bytes, kv_shapes
from loraplex.model.lora_embedding import LoRAEmbedding
from loraplex.model.lora_linear import LoRALinear
from loraplex.model.packed_linear import PackedLinear, packed
from loraplex.model.score_heads import ScoreHeads
from loraplex.model.step_memo import SMALL_STEP, StepMemo
from loraplex.ops.attention import packed_attention

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MEMO_MEMORY = "5%"  # budget of the step memo, of the free memory

EMBEDDING, OUTPUT, NORM, LAYER = "model.embed_tokens", "lm_head", "model.norm.weight", "model.layers.{}."


def decodes(config: Any, weights: Weights) -> bool:
    """Whether `Decoder` can compute this config from these weights, with the same result as transformers' model."""
    if config.model_type not in FAMILIES:
        return False
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)
    if (
        config.hidden_act not in ("silu", "swish")
        or config.rope_parameters.get("rope_type") not in ("default", *ROPE_INIT_FUNCTIONS)
        or min(sizes) < 1
    ):
        return False
    return needed_shapes(config).keys() <= weights.names


def needed_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight that the files must hold, by name."""
    shapes = weight_shapes(config)
    if config.tie_word_embeddings:
        del shapes[f"{OUTPUT}.weight"]
    return shapes


def weight_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by name."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, head_dim(config)
    num_q, num_kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    is_qwen2 = config.model_type == "qwen2"
    has_bias, mlp_has_bias = (bool(getattr(config, f"{part}_bias", False)) for part in ("attention", "mlp"))
    linears = {  # name -> (out, in), has a bias
        "self_attn.q_proj": ((num_q, hidden), has_bias or is_qwen2),
        "self_attn.k_proj": ((num_kv, hidden), has_bias or is_qwen2),
        "self_attn.v_proj": ((num_kv, hidden), has_bias or is_qwen2),
        "self_attn.o_proj": ((hidden, num_q), has_bias),
        "mlp.gate_proj": ((inner, hidden), mlp_has_bias),
        "mlp.up_proj": ((inner, hidden), mlp_has_bias),
        "mlp.down_proj": ((hidden, inner), mlp_has_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.model_type == "qwen3":
        norms |= {"self_attn.q_norm": dim, "self_attn.k_norm": dim}
    shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        prefix = LAYER.format(index)
        for name, (shape, with_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if with_bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        shapes |= {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}
    return {**shapes, NORM: (hidden,), f"{OUTPUT}.weight": (config.vocab_size, hidden)}


def decoder_layers(config: Any) -> BaseLayers:
    """Return the layers that an adapter may change. Reads no weights."""
    shapes = weight_shapes(config)
    matrices = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
    embedding, output = matrices.pop(EMBEDDING), matrices.pop(OUTPUT)
    return BaseLayers(
        linear={path: (shape[0], shape[1]) for path, shape in matrices.items()},
        embeddings={EMBEDDING: (embedding[0], embedding[1])},
        output=OUTPUT,
        output_shape=(output[0], output[1]),
        tied=bool(config.tie_word_embeddings),
        biases=frozenset(name.removesuffix(".bias") for name in shapes if name.endswith(".bias")),
        hidden_size=int(config.hidden_size),
    )


class Decoder:
    """A Model of our own. Every layer takes the step's inputs as an argument."""

    has_experts = False

    def __init__(
        self,
        config: Any,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        """Reads the weights one by one. capture: captures small steps as CUDA graphs; None turns it off. Raises
        UnsupportedModelError where a weight is missing or has another shape."""
        self.device, self.dtype, self.vocab_size = device, dtype, int(config.vocab_size)
        self._kv_shapes = kv_shapes(config)
        self.kv_bytes = kv_bytes(self._kv_shapes, dtype)
        self._cache: KVCache | None = None
        self._pieces = None if capture is None else PieceRunner(capture, SMALL_STEP)
        # The stacks and graphs that are kept between small steps.
        self.memo = StepMemo(budget_bytes(MEMO_MEMORY, device), captures=capture is not None)
        shapes = weight_shapes(config)

        def read(name: str) -> torch.Tensor | None:
            return weights.read(name, shapes[name], dtype, device) if name in shapes else None

        def needed(name: str) -> torch.Tensor:
            tensor = read(name)
            assert tensor is not None, f"{name} is no weight of a {config.model_type}"
            return tensor

        def linear(path: str) -> LoRALinear:
            return LoRALinear(packed(_linear(needed(f"{path}.weight"), read(f"{path}.bias"))))

        embedding = nn.Embedding.from_pretrained(needed(f"{EMBEDDING}.weight"))
        is_tied = bool(config.tie_word_embeddings)
        head = _linear(embedding.weight if is_tied else needed(f"{OUTPUT}.weight"), None)
        self.embed_tokens, self.lm_head = LoRAEmbedding(embedding), LoRALinear(head)
        self.layers = [
            DecoderLayer(config, index, linear, read, self._pieces) for index in range(config.num_hidden_layers)
        ]
        self._norm, self._eps = needed(NORM), float(config.rms_norm_eps)
        self._rotary = RotaryEmbedding(config, device)
        self.scores = ScoreHeads(device, dtype)
        paths: dict[str, AdaptedLayer] = {EMBEDDING: self.embed_tokens, OUTPUT: self.lm_head}
        for layer in self.layers:
            paths |= layer.linears
        self._adapted = AdaptedLayers(paths, OUTPUT, self.scores, wrap=_no_such_layer)

    @property
    def max_captured_tokens(self) -> int:
        return 0 if self._pieces is None or self._pieces.failed else SMALL_STEP

    def allocate_cache(self, num_slots: int) -> None:
        self._cache = KVCache(self._kv_shapes, num_slots, self.dtype, self.device)

    def forward(self, inputs: ModelInputs) -> ModelOutput:
        if self._pieces is not None:
            self._pieces.check()
        self.memo.begin(inputs.segments, inputs.last_segments)
        try:
            hidden = self.embed_tokens(inputs.input_ids, inputs.segments)
            cos, sin = self._rotary(inputs.position_ids, self.dtype)
            for layer in self.layers:
                hidden = layer(hidden, cos, sin, inputs, self._cache)
            hidden = rms_norm(hidden, self._norm, self._eps)
            return ModelOutput(self.lm_head(hidden, inputs.last_segments), hidden)
        except torch.OutOfMemoryError:
            self.memo.clear()
            raise
        finally:
            self.memo.end(inputs.segments, inputs.last_segments)
            if self._pieces is not None:
                self._pieces.forget_inputs()
                if self._pieces.failed and self.memo.captures:
                    self.memo.captures = False
                    self.memo.clear()

    def set_slot(self, slot: int, adapter: AdapterWeights) -> None:
        self.memo.clear_slot(slot)
        self._adapted.set_slot(slot, adapter)

    def clear_slot(self, slot: int) -> None:
        self.memo.clear_slot(slot)
        self._adapted.clear_slot(slot)

    def parameter(self, name: str) -> torch.Tensor | None:
        return self._adapted.parameter(name)


class DecoderLayer:
    """Norm, attention, residual, norm, gated MLP, residual. The last layer computes the wanted rows only."""

    def __init__(self, config: Any, index: int, linear: Any, read: Any, pieces: PieceRunner | None) -> None:
        """linear: makes the layer at a path. read: returns the weight of a name, or None where the family has none."""
        prefix = LAYER.format(index)
        self._index, self._is_last = index, index == config.num_hidden_layers - 1
        self._pieces = None if self._is_last else pieces
        self._head_dim, self._eps = head_dim(config), float(config.rms_norm_eps)
        self._scaling, self._window = 1 / math.sqrt(self._head_dim), _window(config, index)
        self.linears: dict[str, LoRALinear] = {}

        def projection(name: str) -> LoRALinear:
            self.linears[prefix + name] = layer = linear(prefix + name)
            assert isinstance(layer, LoRALinear)
            return layer

        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (projection(f"self_attn.{x}_proj") for x in "qkvo")
        self.gate_proj, self.up_proj, self.down_proj = (projection(f"mlp.{x}_proj") for x in ("gate", "up", "down"))
        self._input_norm, self._mlp_norm = (
            read(f"{prefix}{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")
        )
        self._q_norm, self._k_norm = (read(f"{prefix}self_attn.{x}_norm.weight") for x in "qk")  # Qwen3

    def __call__(
        self,
        hidden: torch.Tensor,  # [T, hidden]
        cos: torch.Tensor,  # [T, head_dim]
        sin: torch.Tensor,  # [T, head_dim]
        inputs: ModelInputs,
        cache: KVCache | None,
    ) -> torch.Tensor:  # [T, hidden]; from the last layer [L, hidden]
        segments, layout = inputs.segments, inputs.layout
        before = self._run("before", self._before, segments, hidden=hidden, cos=cos, sin=sin)
        key, value = before["key"], before["value"]
        if cache is not None and inputs.kv_rows is not None and inputs.kv_slots is not None:
            cache.write(self._index, inputs.kv_slots, key[inputs.kv_rows], value[inputs.kv_rows])
        if self._is_last:
            rows, segments, layout = inputs.logit_rows, inputs.last_segments, inputs.last_layout
            hidden = hidden[rows]
            query = self._query(before["x"][rows], cos[rows], sin[rows], segments)
        else:
            query = before["query"]
        attended = packed_attention(
            query,
            key,
            value,
            layout,
            cache=None if cache is None else cache.layer(self._index),
            scaling=self._scaling,
            window=self._window,
        )
        return self._run("after", self._after, segments, attended=attended, hidden=hidden)["hidden"]

    def _run(self, name: str, piece: Piece, segments: Segments, **inputs: torch.Tensor) -> Tensors:
        if self._pieces is None or segments.graphs is None:
            return piece(**inputs, segments=segments)
        return self._pieces.run(
            segments.graphs,
            (self._index, name),
            lambda **tensors: piece(**tensors, segments=segments),
            segments.num_tokens,
            **inputs,
        )

    def _before(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, segments: Segments) -> Tensors:
        """Return keys and values [T, num_kv_heads, head_dim], and the queries. The last layer returns `x` instead of
        queries, because it projects only the wanted rows of `x`."""
        x = rms_norm(hidden, self._input_norm, self._eps)
        key, value = self._heads(self.k_proj(x, segments)), self._heads(self.v_proj(x, segments))
        if self._k_norm is not None:
            key = rms_norm(key, self._k_norm, self._eps)
        found = {"key": rotated(key, cos, sin), "value": value}
        return found | ({"x": x} if self._is_last else {"query": self._query(x, cos, sin, segments)})

    def _query(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, segments: Segments) -> torch.Tensor:
        query = self._heads(self.q_proj(x, segments))
        if self._q_norm is not None:
            query = rms_norm(query, self._q_norm, self._eps)
        return rotated(query, cos, sin)

    def _after(self, attended: torch.Tensor, hidden: torch.Tensor, segments: Segments) -> Tensors:
        hidden = self.o_proj.plus(attended.flatten(1), hidden, segments)
        x = rms_norm(hidden, self._mlp_norm, self._eps)
        return {"hidden": self.down_proj.plus(self._gated(x, segments), hidden, segments)}

    def _gated(self, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Return silu(gate(x)) * up(x)."""
        gate, up = self.gate_proj.base_layer, self.up_proj.base_layer
        is_adapted = self.gate_proj.is_active(segments) or self.up_proj.is_active(segments)
        if isinstance(gate, PackedLinear) and isinstance(up, PackedLinear) and not is_adapted:
            return up.times(x, gate(x, "swish"))
        return F.silu(self.gate_proj(x, segments), inplace=True).mul_(self.up_proj(x, segments))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, self._head_dim)


class RotaryEmbedding:
    """Computes cos and sin of each position as transformers does for the config's rope type."""

    def __init__(self, config: Any, device: torch.device) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        kind = config.rope_parameters["rope_type"]
        if kind == "default":
            dim = head_dim(config)
            exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
            frequencies, self._scaling = 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0
        else:
            frequencies, self._scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        self._frequencies = frequencies.to(device)  # [head_dim / 2]

    def __call__(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, [T, head_dim] each. position_ids: [T]."""
        angles = position_ids[:, None].float() * self._frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self._scaling).to(dtype), (angles.sin() * self._scaling).to(dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x**2) + eps) * weight, over the last dimension. One kernel, which rounds once; transformers'
    module runs six."""
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        return _normalized_rows(x, eps).mul_(weight)
    return F.rms_norm(x, weight.shape, weight, eps)


def _normalized_rows(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x**2) + eps), for bfloat16 on a CPU. There, F.rms_norm takes six passes over float32 copies.
    Batch norm's kernel reads and writes bfloat16 and scales in float32; the rows are its channels."""
    rows = x.reshape(1, -1, x.shape[-1])
    squares = torch.linalg.vector_norm(rows[0], dim=-1, dtype=torch.float32).square_().div_(x.shape[-1])
    mean = torch.zeros_like(squares)
    return F.batch_norm(rows, mean, squares, eps=eps).view(x.shape)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x * cos + rotate_half(x) * sin, without copies of x's halves. x: [n, heads, D]; cos, sin: [n, D]."""
    half, output = x.shape[-1] // 2, torch.empty_like(x)
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos[..., :half], out=output[..., :half]).addcmul_(second, sin[..., :half], value=-1)
    torch.mul(second, cos[..., half:], out=output[..., half:]).addcmul_(first, sin[..., half:])
    return output


def _window(config: Any, index: int) -> int | None:
    """Return how many tokens a layer with sliding attention sees; None for all."""
    window: int | None = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ()
    slides = index < len(layer_types) and layer_types[index] == "sliding_attention"
    return window if slides or config.model_type == "mistral" else None


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _no_such_layer(path: str) -> AdaptedLayer:
    raise UnsupportedModelError(path, "the base has no such layer", remedy="serve the adapter on its own base")
