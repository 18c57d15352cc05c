"""The seam between the engine and what computes: one base with adapters in slots."""

from typing import Protocol

import torch

from loraplex.adapters.weights import AdapterWeights
from loraplex.model.inputs import ModelInputs, ModelOutput
from loraplex.model.step_memo import StepMemo


class Model(Protocol):
    """One thread runs `forward`; another may set and clear slots meanwhile, of adapters that no running step uses."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        ...

    @property
    def memo(self) -> StepMemo:
        """What is kept between small steps."""
        ...

    @property
    def max_captured_tokens(self) -> int:
        """Steps of at most so many tokens are captured as CUDA graphs where their segments come again; 0: none is."""
        ...

    def allocate_cache(self, num_slots: int) -> None:
        """Make room for the K/V of `num_slots` tokens."""
        ...

    def forward(self, inputs: ModelInputs) -> ModelOutput:
        """One forward pass. Raises torch.OutOfMemoryError where the device's memory does not hold it."""
        ...

    def set_slot(self, slot: int, adapter: AdapterWeights) -> None: ...

    def clear_slot(self, slot: int) -> None: ...

    def has_score(self, slot: int) -> bool:
        """Whether the slot's adapter answers by a score head of its own and not by tokens."""
        ...

    def score(self, slot: int, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [hidden], one row of ModelOutput. Returns [num_labels] log probabilities in float32."""
        ...

    def parameter(self, name: str) -> torch.Tensor | None:
        """The base's own tensor, such as "lm_head.weight"; None where the base has none of that name."""
        ...
