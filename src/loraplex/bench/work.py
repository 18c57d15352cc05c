"""What a conversation costs at least: the FLOPs of a model's products."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraplex.bench.load import Sample
from loraplex.bundle import Bundle
from loraplex.model.loader import read_config
from loraplex.planning.adapter_size import read_adapter_size
from loraplex.planning.base_shape import is_decoded, shape_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The sizes of a base and its adapters, in weights. Attention's products of keys and values are left out, and so is
    LoRA that acts on an activation's tokens only: what is counted is a lower bound.

    layers:     (outputs, inputs, how many of this size).
    per_token:  weights that each computed token is multiplied with.
    per_row:    weights that only the rows of a verdict need: the output head, and most of the last layer.
    lora:       adapter -> weights that act on each of its tokens.
    """

    layers: tuple[tuple[int, int, int], ...]
    per_token: int
    per_row: int
    lora: Mapping[str, int]

    @property
    def num_weights(self) -> int:
        """Weights of the base's products that a pass reads at least once: of experts, those of one token."""
        return self.per_token + self.per_row

    def flops(self, num_tokens: int, classifiers: Sequence[str]) -> float:
        """Return the FLOPs of `num_tokens` computed tokens, which the classifiers' prompts share equally."""
        lora = sum(self.lora.get(name, 0) for name in classifiers) / len(classifiers)
        return 2 * num_tokens * (self.per_token + lora) + 2 * len(classifiers) * self.per_row

    def of(self, sample: Sample) -> float:
        """Return the FLOPs that a request's computed tokens need at least."""
        return self.flops(sample.reply.computed_tokens, sample.classifiers)


def work_of(bundle: Bundle, classifiers: Sequence[str]) -> Work:
    """Return the work of a bundle. Reads the headers of its files. Raises ConfigurationError where one cannot be."""
    config = read_config(bundle.base, packs=False)
    base = shape_of(config, bundle.base, packs=is_decoded(config))
    sizes = Counter(shape for path, shape in base.layers.linear.items() if path not in base.layers.beside_text)
    adapters = {one.name: read_adapter_size(one, base.layers) for one in bundle.adapters if one.name in classifiers}
    return Work(
        layers=tuple((out, n, count) for (out, n), count in sizes.items()),
        per_token=base.num_dense + round(base.active * base.num_experts) - base.num_last,
        per_row=base.num_head + base.num_last,
        lora={name: 0 if one.shares_prefix else one.num_lora for name, one in adapters.items()},
    )
