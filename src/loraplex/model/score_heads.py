"""Score heads (PEFT's SEQ_CLS): read labels, not tokens, from the hidden state of a sequence's last token."""

import torch
import torch.nn.functional as F

from loraplex.adapters.weights import SavedModule


class ScoreHeads:
    """The score heads of adapters, by slot."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._heads: dict[int, SavedModule] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._heads

    def set_slot(self, slot: int, head: SavedModule) -> None:
        bias = head.bias
        self._heads[slot] = SavedModule(
            weight=head.weight.to(self._device, self._dtype, copy=True),
            bias=None if bias is None else bias.to(self._device, self._dtype, copy=True),
        )

    def clear_slot(self, slot: int) -> None:
        self._heads.pop(slot, None)

    def score(self, slot: int, hidden: torch.Tensor) -> torch.Tensor:  # [hidden] -> [num_labels] float32
        """Return the log probabilities of the labels."""
        head = self._heads[slot]
        return F.linear(hidden, head.weight, head.bias).float().log_softmax(-1)
