"""Bases of real shapes with random weights, random adapters for them, and the work of a forward pass."""

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

from loraplex.adapters.weights import AdapterWeights, BaseLayers, LoRAWeights
from loraplex.model.decoder import weight_shapes
from loraplex.planning.base_shape import BaseShape, shape_of
from loraplex.planning.work import Run, Work, num_lora_weights, work

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
    "30M": dict(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8192,
    ),
    "116M": dict(
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=8192,
    ),
    "350M": dict(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
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


def random_adapter(layers: BaseLayers, rank: int, seed: int, targets: Collection[str] = ()) -> AdapterWeights:
    """Return LoRA on the linear layers whose paths end in one of `targets`; on all of them where it is empty."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LoRAWeights(
            lora_A=torch.randn(rank, n, generator=generator) / n**0.5,
            lora_B=torch.randn(out, rank, generator=generator) / 100,
            scaling=2.0,
        )
        for path, (out, n) in layers.linear.items()
        if not targets or path.rpartition(".")[2] in targets
    }
    return AdapterWeights(modules=modules, kv_id=hashlib.sha256(b"%d" % seed).hexdigest())


def texts_work(shape: str, runs: Iterable[Run], *, num_adapters: int, rank: int, num_rows: int) -> Work:
    """Return the work of one forward pass with adapters of one rank on all linear layers. runs: their `num_lora` is
    whether an adapter changes their tokens."""
    base = base_shape(shape)
    lora = num_lora_weights(base.layers, rank)
    adapted = [run._replace(num_lora=lora if run.num_lora else 0) for run in runs]
    return work(base, adapted, num_rows=num_rows, num_adapter_weights=num_adapters * lora)


@functools.cache
def base_shape(shape: str) -> BaseShape:
    return shape_of(base_config(shape), Path(shape))


def layer_sizes(shape: str) -> list[tuple[int, int, int]]:
    """Return (outputs, inputs, how many layers have this size), as `gemm_rate` takes them."""
    return [(out, n, count) for (out, n), count in Counter(base_shape(shape).layers.linear.values()).items()]
