"""What an adapter is once it has been read, and what a base must say about itself so that one can be checked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAWeights:
    """One layer's update: delta = scaling * lora_B @ lora_A. For an embedding lora_A is [rank, num_embeddings] and
    lora_B [embedding_dim, rank]."""

    lora_A: torch.Tensor  # [rank, in_features]
    lora_B: torch.Tensor  # [out_features, rank]
    scaling: float
    lora_bias: torch.Tensor | None = None  # [out_features] the bias of lora_B, as stored: it is scaled as lora_B is
    magnitude: torch.Tensor | None = None  # [out_features] of DoRA; for an embedding [embedding_dim]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedModule:
    """A module that was trained in full and replaces the base's (modules_to_save)."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """All paths are those of the base's causal language model, for SEQ_CLS adapters too.

    kv_id: sha256 in hex of everything that changes what is computed, tensors and config.
    invocation_tokens: the adapter acts from where they stand last in the prompt (aLoRA); None: on all of it.
    """

    modules: Mapping[str, LoRAWeights]  # linear layers, Conv1D among them in [out, in] orientation
    kv_id: str
    invocation_tokens: tuple[int, ...] | None = None
    embeddings: Mapping[str, LoRAWeights] = field(default_factory=dict)
    output: LoRAWeights | None = None  # of the output head
    saved: Mapping[str, SavedModule] = field(default_factory=dict)  # of the token embedding and the output head
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)  # path of a linear layer -> its bias, replaced
    token_rows: Mapping[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    # ^ path of an embedding -> (token ids, [len(ids), embedding_dim] rows that replace the base's)
    score: SavedModule | None = None  # SEQ_CLS: the head, [num_labels, hidden_size]

    @property
    def rank(self) -> int:
        return max((lora.rank for lora in self._loras()), default=0)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def changes_prefix(self) -> bool:
        """Whether K/V in front of an aLoRA activation differ from the base's."""
        return bool(self.embeddings or self.saved or self.token_rows or self.biases)

    @property
    def is_zero(self) -> bool:
        """Whether the answers are the base's: an adapter that was never trained, most likely."""
        if self.saved or self.biases or self.token_rows or self.score is not None:
            return False
        return all(
            lora.magnitude is None and not lora.lora_B.any() and (lora.lora_bias is None or not lora.lora_bias.any())
            for lora in self._loras()
        )

    def tensors(self) -> Iterator[torch.Tensor]:
        for lora in self._loras():
            yield from _given(lora.lora_A, lora.lora_B, lora.lora_bias, lora.magnitude)
        for module in (*self.saved.values(), *_given(self.score)):
            yield from _given(module.weight, module.bias)
        yield from self.biases.values()
        yield from (rows for _, rows in self.token_rows.values())

    def _loras(self) -> Iterator[LoRAWeights]:
        yield from self.modules.values()
        yield from self.embeddings.values()
        yield from _given(self.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseLayers:
    """The layers of a base's causal language model that an adapter may change."""

    linear: Mapping[str, tuple[int, int]]  # path -> (out_features, in_features), Conv1D included, the head not
    embeddings: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # path -> (num_embeddings, embedding_dim)
    output: str | None = None  # path of the output head
    output_shape: tuple[int, int] = (0, 0)  # (vocab_size, hidden_size)
    tied: bool = False  # the output head is the token embedding's weight
    biases: frozenset[str] = frozenset()  # linear layers that have a bias, Conv1D included
    other_biases: frozenset[str] = frozenset()  # other modules that have one (LayerNorm)
    conv1d: frozenset[str] = frozenset()
    hidden_size: int = 0


def _given(*items: Item | None) -> Iterator[Item]:
    return (item for item in items if item is not None)
