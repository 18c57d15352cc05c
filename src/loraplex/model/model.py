"""The seam between the engine and the model: one base with adapters in slots."""

from typing import Protocol

import torch

from loraplex.adapters.weights import AdapterWeights
from loraplex.model.inputs import ModelInputs, ModelOutput
from loraplex.model.score_heads import ScoreHeads


class Model(Protocol):
    """One base with adapters in slots. One thread runs `forward`; another may set and clear slots meanwhile, but only
    slots that no running step uses."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def has_experts(self) -> bool:
        """Whether layers are mixtures of experts. The products of an expert are as large as the number of its tokens,
        so a text's answer is rounded differently beside other texts."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        ...

    @property
    def scores(self) -> ScoreHeads:
        """The score heads of the adapters that answer with one, not with tokens. They read rows of `hidden`."""
        ...

    @property
    def max_captured_tokens(self) -> int:
        """Steps of at most this many tokens are captured as CUDA graphs if their segments recur; 0: no step is."""
        ...

    def allocate_cache(self, num_slots: int) -> None:
        """Make room for the K/V of `num_slots` tokens."""
        ...

    def forward(self, inputs: ModelInputs) -> ModelOutput:
        """Run one forward pass. Raises torch.OutOfMemoryError where the step exceeds the device's memory."""
        ...

    def set_slot(self, slot: int, adapter: AdapterWeights) -> None: ...

    def clear_slot(self, slot: int) -> None: ...

    def parameter(self, name: str) -> torch.Tensor | None:
        """Return the base's own tensor, such as "lm_head.weight"; None where the base has no tensor of that name."""
        ...
