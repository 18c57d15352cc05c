"""An adapter's weights in memory, and the layers of a base that an adapter is checked against."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAWeights:
    """One layer's update: delta = scaling * lora_B @ lora_A. For an embedding, lora_A is [rank, num_embeddings] and
    lora_B is [embedding_dim, rank]."""

    lora_A: torch.Tensor  # [rank, in_features]
    lora_B: torch.Tensor  # [out_features, rank]
    scaling: float
    lora_bias: torch.Tensor | None = None  # [out_features] the bias of lora_B, unscaled: `scaling` applies to it, too
    magnitude: torch.Tensor | None = None  # DoRA's: [out_features], or [embedding_dim]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def is_zero(self) -> bool:
        """Whether the layer is unchanged. A magnitude counts as a change: only the base's weights could tell."""
        delta = self.lora_A.any() and self.lora_B.any()
        bias = self.lora_bias is not None and self.lora_bias.any()
        return self.magnitude is None and not delta and not bias


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedModule:
    """A module that was trained in full. It replaces the base's."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """One adapter. Paths are those of the base's causal language model, also for adapters that classify (SEQ_CLS).

    The parts apply in this order: a saved module replaces the base's weight (and bias), a bias or token rows replace a
    part of the result, and LoRA adds to it.

    kv_id:              SHA-256, in hex, of everything that changes the computation: tensors and config.
    invocation_tokens:  LoRA acts from their last occurrence in the prompt on (aLoRA); None: on the whole prompt. The
                        other parts act on the whole prompt in both cases.
    """

    modules: Mapping[str, LoRAWeights]  # linear layers, Conv1D among them in [out, in] orientation
    kv_id: str
    invocation_tokens: tuple[int, ...] | None = None
    embeddings: Mapping[str, LoRAWeights] = field(default_factory=dict)
    output: LoRAWeights | None = None  # of the output head
    saved: Mapping[str, SavedModule] = field(default_factory=dict)  # embeddings and the output head
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)  # path of a linear layer or the head -> its bias
    # path of an embedding or the head -> (token ids, [len(ids), hidden_size] rows that replace the weight's)
    token_rows: Mapping[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    score: SavedModule | None = None  # SEQ_CLS: the head, [num_labels, hidden_size], in place of the base's output head
    output_path: str | None = None  # path of the base's output head
    kinds: frozenset[str] = frozenset()  # what the adapter needs from a backend: see `adapters.kinds`

    @property
    def rank(self) -> int:
        """The largest rank of any layer; 0 without LoRA."""
        return max((lora.rank for lora in self._loras()), default=0)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def num_placed(self) -> int:
        """Number of parameters that a slot holds. A tensor counts twice where two layers share it, or where the
        companion slot holds it, too."""
        tensors = [(name, part) for name, part in self._parts() if isinstance(part, torch.Tensor)]
        is_twice = self.invocation_tokens is not None and self.changes_prefix
        prefix = ("saved ", "biases ", "token_rows ")
        return sum(part.numel() * (2 if is_twice and name.startswith(prefix) else 1) for name, part in tensors)

    @property
    def changes_prefix(self) -> bool:
        """Whether K/V before an aLoRA activation differ from the base's, so that they cannot be shared."""
        changed = {*self.embeddings, *self.saved, *self.biases, *self.token_rows} - {self.output_path}
        return bool(changed)

    @property
    def is_zero(self) -> bool:
        """Whether the adapter changes nothing, like one that was never trained."""
        if self.saved or self.biases or self.token_rows or self.score is not None:
            return False
        return all(lora.is_zero for lora in self._loras())

    def tensors(self) -> Iterator[torch.Tensor]:
        """Return each tensor once, although two paths may share one (a tied embedding and head)."""
        unique = {id(part): part for _, part in self._parts() if isinstance(part, torch.Tensor)}
        return iter(unique.values())

    def with_content_id(self) -> "AdapterWeights":
        """Return a copy with `kv_id` computed."""
        digest = hashlib.sha256(json.dumps(self.invocation_tokens).encode())
        for name, part in sorted(self._parts(), key=lambda named: named[0]):
            if isinstance(part, torch.Tensor):
                digest.update(json.dumps([name, str(part.dtype), list(part.shape)]).encode())
                digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                digest.update(json.dumps([name, part]).encode())
        return replace(self, kv_id=digest.hexdigest())

    def without_base_copies(self, parameter: Callable[[str], torch.Tensor | None]) -> "AdapterWeights":
        """Return a copy without the tensors that only repeat the base's own.

        parameter:  returns the base's tensor of a name, such as "lm_head.weight"; None where the base has none.
        PEFT stores such copies beside LoRA on an embedding or head, and with `bias="all"`. Each would cost memory and,
        in an embedding, the shared prefix."""

        def repeats(name: str, tensor: torch.Tensor | None, rows: tuple[int, ...] | None = None) -> bool:
            if tensor is None:
                return True
            base = parameter(name)
            if base is None:
                return False
            base = base if rows is None else base[list(rows)]
            return base.shape == tensor.shape and torch.equal(base, tensor.to(base.device, base.dtype))

        return replace(
            self,
            saved={
                path: module
                for path, module in self.saved.items()
                if not (repeats(f"{path}.weight", module.weight) and repeats(f"{path}.bias", module.bias))
            },
            biases={path: bias for path, bias in self.biases.items() if not repeats(f"{path}.bias", bias)},
            token_rows={
                path: (ids, rows)
                for path, (ids, rows) in self.token_rows.items()
                if not repeats(f"{path}.weight", rows, ids)
            },
        )

    def _loras(self) -> Iterator[LoRAWeights]:
        yield from self.modules.values()
        yield from self.embeddings.values()
        if self.output is not None:
            yield self.output

    def _parts(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, part) for everything that changes the computation."""
        loras = {f"modules {path}": lora for path, lora in self.modules.items()}
        loras |= {f"embeddings {path}": lora for path, lora in self.embeddings.items()}
        loras |= {} if self.output is None else {"output": self.output}
        for name, lora in loras.items():
            yield f"{name} scaling", lora.scaling
            for part in ("lora_A", "lora_B", "lora_bias", "magnitude"):
                if getattr(lora, part) is not None:
                    yield f"{name} {part}", getattr(lora, part)
        saved = {f"saved {path}": module for path, module in self.saved.items()}
        saved |= {} if self.score is None else {"score": self.score}
        for name, module in saved.items():
            yield f"{name} weight", module.weight
            if module.bias is not None:
                yield f"{name} bias", module.bias
        for path, bias in self.biases.items():
            yield f"biases {path}", bias
        for path, (ids, rows) in self.token_rows.items():
            yield f"token_ids {path}", ids
            yield f"token_rows {path}", rows


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseLayers:
    """The layers of a base's causal language model that an adapter may change, with their shapes."""

    linear: Mapping[str, tuple[int, int]]  # path -> (out_features, in_features), with Conv1D, without the head
    # path -> (num_embeddings, embedding_dim), the token embedding first
    embeddings: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    output: str | None = None  # path of the output head
    output_shape: tuple[int, int] = (0, 0)  # (vocab_size, hidden_size)
    tied: bool = False  # the head shares the token embedding's weight
    biases: frozenset[str] = frozenset()  # linear layers (with Conv1D) and the head, where they have a bias
    other_biases: frozenset[str] = frozenset()  # other modules that have a bias (LayerNorm)
    conv1d: frozenset[str] = frozenset()
    hidden_size: int = 0
    beside_text: frozenset[str] = frozenset()  # linear layers that no text passes through: a vision tower's
    former_names: Mapping[str, str] = field(default_factory=dict)  # how names of LoRA tensors began -> how they begin

    @property
    def token_embedding(self) -> str | None:
        return next(iter(self.embeddings), None)
