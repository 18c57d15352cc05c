"""What a conversation costs at least: the FLOPs of a model's products, and the bytes of its weights."""

# TODO(planning): `planning/work.py` says the same of a base's layers; one of the two stays.

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex.adapters.peft_config import read_peft_config
from loraplex.adapters.tensor_file import TensorFile
from loraplex.bench.load import Sample
from loraplex.bundle import ADAPTER_WEIGHTS, AdapterSource, Bundle
from loraplex.errors import AdapterError
from loraplex.model.loader import read_config, read_layers

LORA = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The sizes of a base and its adapters, in weights. Attention's products of keys and values are left out, and so is
    LoRA that acts on an activation's tokens only: what is counted is a lower bound.

    layers:   (outputs, inputs, how many of this size).
    head:     the output head, which each verdict computes for one row.
    lora:     adapter -> weights that act on each of its tokens.
    """

    layers: tuple[tuple[int, int, int], ...]
    head: int
    lora: Mapping[str, int]

    @property
    def num_weights(self) -> int:
        """Weights of the base's products, each of which a pass reads at least once."""
        return sum(out * n * count for out, n, count in self.layers) + self.head

    def flops(self, num_tokens: int, classifiers: Sequence[str]) -> float:
        """Return the FLOPs of `num_tokens` computed tokens, which the classifiers' prompts share equally."""
        linear = sum(out * n * count for out, n, count in self.layers)
        lora = sum(self.lora.get(name, 0) for name in classifiers) / len(classifiers)
        return 2 * num_tokens * (linear + lora) + 2 * len(classifiers) * self.head

    def of(self, sample: Sample) -> float:
        """Return the FLOPs that a request's computed tokens need at least."""
        return self.flops(sample.reply.computed_tokens, sample.classifiers)


def work_of(bundle: Bundle, classifiers: Sequence[str]) -> Work:
    """Return the work of a bundle. Reads the headers of its files. Raises ConfigurationError where one cannot be."""
    layers, _ = read_layers(read_config(bundle.base, packs=False), bundle.base, packs=False)
    sizes: dict[tuple[int, int], int] = {}
    for path, shape in layers.linear.items():
        if path not in layers.beside_text:
            sizes[shape] = sizes.get(shape, 0) + 1
    return Work(
        layers=tuple((out, n, count) for (out, n), count in sizes.items()),
        head=math.prod(layers.output_shape),
        lora={one.name: _num_lora(one) for one in bundle.adapters if one.name in classifiers},
    )


def _num_lora(source: AdapterSource) -> int:
    if read_peft_config(source.path).alora_invocation_tokens:
        return 0
    entries = TensorFile(source.path / ADAPTER_WEIGHTS, AdapterError).entries
    return sum(math.prod(one.shape) for name, one in entries.items() if any(part in name for part in LORA))
