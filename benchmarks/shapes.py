"""Bases of real shapes with random weights, random adapters for them, and the work of a forward pass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

from loraplex.adapters.weights import AdapterWeights, BaseLayers, LoRAWeights
from loraplex.model.decoder import weight_shapes

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    ),
    "6M": dict(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4096,
    ),
    "116M": dict(
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=8192,
    ),
    "7B": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Holds what one forward pass computes and reads: every layer on every token, the head on the wanted rows.

    linear, lora, attention:  FLOPs.
    num_weights:              weights of the base and of the adapters; each is read at least once.
    """

    linear: int
    lora: int
    attention: int
    num_weights: int

    @property
    def total(self) -> int:
        """FLOPs of all parts."""
        return self.linear + self.lora + self.attention


def base_config(shape: str) -> MistralConfig:
    return MistralConfig(**SHAPES[shape], max_position_embeddings=4096, sliding_window=None, tie_word_embeddings=True)


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return transformers' model with random weights, made on the device: a 7B model in bfloat16 takes 14 GB there, and
    nothing on the host or on disk."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return MistralForCausalLM(base_config(shape)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


class ModelWeights:
    """The tensors of a model in memory, read as `Decoder` reads the files of a base. Both models then share them."""

    def __init__(self, model: Any) -> None:
        self._tensors: dict[str, torch.Tensor] = model.state_dict()
        self.names = frozenset(self._tensors)

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tensor = self._tensors[name]
        assert tensor.shape == shape, f"{name} has shape {list(tensor.shape)}, not {list(shape)}"
        return tensor.to(device, dtype)


def save_base(shape: str, folder: Path, dtype: torch.dtype) -> None:
    random_model(shape, dtype, torch.device("cpu")).save_pretrained(folder)


def num_parameters(shape: str) -> int:
    """A tied head counts once."""
    shapes = weight_shapes(base_config(shape))
    return sum(math.prod(size) for name, size in shapes.items() if name != "lm_head.weight")


def random_adapter(layers: BaseLayers, rank: int, seed: int) -> AdapterWeights:
    """LoRA on all linear layers."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LoRAWeights(
            lora_A=torch.randn(rank, n, generator=generator) / n**0.5,
            lora_B=torch.randn(out, rank, generator=generator) / 100,
            scaling=2.0,
        )
        for path, (out, n) in layers.linear.items()
    }
    return AdapterWeights(modules=modules, kv_id=bytes([seed]).hex() * 32)


def work(
    shape: str,
    *,
    num_tokens: int,
    num_adapted: int,
    num_adapters: int,
    rank: int,
    num_visible_keys: int,
    num_logit_rows: int,
) -> Work:
    """num_adapted: tokens that an adapter changes. num_visible_keys: summed over all query tokens."""
    s = SHAPES[shape]
    head_dim = s["hidden_size"] // s["num_attention_heads"]
    kv = s["num_key_value_heads"] * head_dim
    h, i = s["hidden_size"], s["intermediate_size"]
    sizes = [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]
    layers, head = s["num_hidden_layers"], h * s["vocab_size"]
    linear, lora = layers * sum(n * out for n, out in sizes), layers * rank * sum(n + out for n, out in sizes)
    return Work(
        linear=2 * num_tokens * linear + 2 * num_logit_rows * head,
        lora=2 * num_adapted * lora,
        attention=4 * layers * num_visible_keys * h,
        num_weights=linear + head + num_adapters * lora,
    )
