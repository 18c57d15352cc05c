"""What counts of a base for memory and time: the sizes of its layers. Reads its config, and never its weights."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.weights import BaseLayers
from loraplex.model.base_weights import BaseWeights
from loraplex.model.decoder import FAMILIES, LAYER, OUTPUT, decoder_layers, decodes, weight_shapes
from loraplex.model.kv_cache import Shape, head_dim
from loraplex.model.loader import base_layers, build_skeleton, inner_size, max_positions

EXPERT = re.compile(r"\.experts?\.\d+\.")
# How configs name the number of experts that each token passes through.
ACTIVE_EXPERTS = "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k".split()
# What the last layer of our decoder computes for every token. It computes the rest for the wanted rows only.
LAST_FOR_ALL = ("self_attn.k_proj", "self_attn.v_proj")


class AttentionShape(NamedTuple):
    """One layer's attention. window: how many tokens it sees; None for all."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def kv(self) -> Shape:
        """(num_kv_heads, head_dim) as the K/V cache holds them: the smaller of keys and values is padded."""
        return self.num_kv_heads, max(self.key_dim, self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSizes:
    """What a base needs in memory.

    num_weights:      parameters in memory. A tied head counts once; all experts count, and so does a vision part.
    attention:        one for each layer.
    has_own_decoder:  whether Loraplex's own decoder computes the base, and not transformers' model.
    stored_bytes:     of the tensors in the base's files; None where there are none.
    """

    model_type: str
    num_weights: int
    attention: tuple[AttentionShape, ...]
    hidden_size: int
    inner_size: int
    vocab_size: int
    max_positions: int
    has_own_decoder: bool
    stored_bytes: int | None = field(default=None, compare=False)

    @property
    def num_kv(self) -> int:
        """Numbers in one token's keys and values over all layers."""
        return sum(2 * heads * dim for heads, dim in (one.kv for one in self.attention))


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShape:
    """What a base computes, beside its sizes.

    layers:       the layers that an adapter may change.
    num_dense:    weights that every token is multiplied with, without the output head and the experts.
    num_experts:  weights of all experts.
    active:       the share of the experts that one token passes through.
    num_last:     the part of `num_dense` that only the wanted rows pass through: most of our decoder's last layer.
    """

    sizes: BaseSizes
    layers: BaseLayers
    num_dense: int
    num_experts: int = 0
    active: float = 0.0
    num_last: int = 0

    @property
    def num_head(self) -> int:
        """Weights of the output head."""
        return math.prod(self.layers.output_shape)


def shape_of(config: PreTrainedConfig, path: Path, *, packs: bool = True) -> BaseShape:
    """Return the shape of a base by its config alone. path: what errors name. packs: as in `loader.read_config`. Raises
    UnsupportedModelError."""
    if packs and is_decoded(config):
        return _decoder_shape(config)
    return _skeleton_shape(config, build_skeleton(config, path, packs=packs))


def stored_sizes(config: PreTrainedConfig, folder: Path, *, packs: bool = True) -> BaseSizes:
    """Return the sizes of the base in a folder. Its parameters are counted in the headers of its files, which takes
    milliseconds. Raises UnsupportedModelError."""
    weights = BaseWeights(folder)
    sizes = _sizes(config, weights.num_parameters(_tied(config)), packs and decodes(config, weights))
    return replace(sizes, stored_bytes=weights.num_bytes)


def is_decoded(config: PreTrainedConfig) -> bool:
    """Whether our own decoder computes this config, if the files hold what it says."""
    return config.model_type in FAMILIES and decodes(config, _Promised(config))


def attention_shapes(config: Any) -> tuple[AttentionShape, ...]:
    """Return the attention of each layer. config: the base's text config."""
    num_heads = int(config.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    key_dim = head_dim(config)
    value_dim = int(getattr(config, "v_head_dim", None) or key_dim)
    if getattr(config, "multi_query", False):
        num_kv_heads = 1
    if config.model_type == "jetmoe":  # each expert of its attention has queries of its own, and the keys repeat
        num_kv_heads = num_heads
    if getattr(config, "kv_lora_rank", None):  # latent attention
        num_kv_heads = num_heads
        key_dim = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
    full = AttentionShape(num_heads, num_kv_heads, key_dim, value_dim)
    sliding = full._replace(window=int(getattr(config, "sliding_window", None) or 0) or None)
    if config.model_type == "mimo_v2_flash":
        sliding = sliding._replace(num_kv_heads=2 * num_kv_heads)
    return tuple(sliding if _slides(config, index) else full for index in range(int(config.num_hidden_layers)))


def _slides(config: Any, index: int) -> bool:
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return bool(layer_types[index] == "sliding_attention")
    return bool(getattr(config, "use_sliding_window", True))


class _Promised:
    """The names of the tensors that the base's files should hold."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.names = frozenset(weight_shapes(config))

    def read(self, *_: Any) -> Any:
        raise AssertionError("there are no weights to read")


def _tied(config: PreTrainedConfig) -> tuple[str, ...]:
    """The names of a head whose weight is the token embedding's."""
    return (f"{OUTPUT}.weight",) if getattr(config, "tie_word_embeddings", False) else ()


def _sizes(config: PreTrainedConfig, num_weights: int, has_own_decoder: bool) -> BaseSizes:
    text: Any = config.get_text_config()
    return BaseSizes(
        model_type=str(config.model_type),
        num_weights=num_weights,
        attention=attention_shapes(text),
        hidden_size=int(text.hidden_size),
        inner_size=inner_size(text),
        vocab_size=int(text.vocab_size),
        max_positions=max_positions(config),
        has_own_decoder=has_own_decoder,
    )


def _decoder_shape(config: Any) -> BaseShape:
    layers, tied = decoder_layers(config), _tied(config)
    shapes = weight_shapes(config)
    last = LAYER.format(config.num_hidden_layers - 1)
    for_all = {last + name for name in LAST_FOR_ALL}
    sizes = {path: math.prod(shape) for path, shape in layers.linear.items()}
    return BaseShape(
        sizes=_sizes(config, sum(math.prod(shape) for name, shape in shapes.items() if name not in tied), True),
        layers=layers,
        num_dense=sum(sizes.values()),
        num_last=sum(size for path, size in sizes.items() if path.startswith(last) and path not in for_all),
    )


def _skeleton_shape(config: PreTrainedConfig, skeleton: nn.Module) -> BaseShape:
    layers = base_layers(skeleton)  # type: ignore[arg-type]
    num_dense = num_experts = 0
    active: list[float] = []
    text = config.get_text_config()
    chosen = next((int(value) for name in ACTIVE_EXPERTS if (value := getattr(text, name, None))), 1)
    for path, module in skeleton.named_modules():
        if path in layers.beside_text or path == layers.output or isinstance(module, nn.Embedding):
            continue
        if EXPERT.search(f"{path}.") and isinstance(module, nn.Linear | Conv1D):
            num_experts += module.weight.numel()
            continue
        if isinstance(module, nn.Linear | Conv1D):
            num_dense += module.weight.numel()
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and "vision" not in path:  # [experts, out, in]
                num_experts += parameter.numel()
                active.append(min(1.0, chosen / len(parameter)))
            elif parameter.ndim == 2 and name == "weight" and "vision" not in path:  # a router's
                num_dense += parameter.numel()
    kept = skeleton.state_dict().keys()
    tensors = [*skeleton.parameters(), *(one for name, one in skeleton.named_buffers() if name in kept)]
    return BaseShape(
        sizes=_sizes(config, sum(one.numel() for one in tensors), False),
        layers=layers,
        num_dense=num_dense,
        num_experts=num_experts,
        active=max(active, default=1.0) if num_experts else 0.0,
    )
