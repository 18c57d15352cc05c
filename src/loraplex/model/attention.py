"""Hugging Face's attention call -> our packed attention. The batch comes through the model's keyword arguments."""

from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from loraplex.errors import UnsupportedModelError
from loraplex.ops.attention import varlen_attention

NAME = "loraplex"

# Arguments that models pass and that change nothing here.
_INERT = frozenset({"dropout", "is_causal", "use_cache", "position_ids", "output_attentions", "output_hidden_states"})


class PackedTokens(Protocol):
    """What attention needs to know of a batch."""

    @property
    def seqlens(self) -> tuple[int, ...]: ...


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, G, T, D]
    value: torch.Tensor,  # [1, G, T, D]
    attention_mask: torch.Tensor | None,
    *,
    batch: PackedTokens,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # [1, T, H, D]
    assert attention_mask is None, "a mask was built for an attention that derives its own"
    for name, given in kwargs.items():
        if given is not None and name not in _INERT:
            raise UnsupportedModelError(
                type(module).__name__,
                f"its attention uses {name!r}, which is not supported",
                remedy="serve another base",
            )
    output = varlen_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        batch.seqlens,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)
