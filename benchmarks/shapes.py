"""Bases of real shapes with random weights, random adapters for them, and the work that a forward pass is."""

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
    """FLOPs of one forward pass: every layer on every token, the head on the rows that are asked for."""

    linear: int
    lora: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.lora + self.attention


def base_config(shape: str) -> MistralConfig:
    return MistralConfig(**SHAPES[shape], max_position_embeddings=4096, sliding_window=None, tie_word_embeddings=True)


def save_base(shape: str, folder: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = MistralForCausalLM(base_config(shape))
    model.to(dtype).save_pretrained(folder)


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
    shape: str, *, num_tokens: int, num_adapted: int, rank: int, num_visible_keys: int, num_logit_rows: int
) -> Work:
    """num_visible_keys: summed over all query tokens."""
    s = SHAPES[shape]
    head_dim = s["hidden_size"] // s["num_attention_heads"]
    kv = s["num_key_value_heads"] * head_dim
    h, i = s["hidden_size"], s["intermediate_size"]
    sizes = [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]
    layers = s["num_hidden_layers"]
    return Work(
        linear=2 * layers * num_tokens * sum(n * out for n, out in sizes) + 2 * num_logit_rows * h * s["vocab_size"],
        lora=2 * layers * num_adapted * rank * sum(n + out for n, out in sizes),
        attention=4 * layers * num_visible_keys * h,
    )
