"""Plain PyTorch: what each operation means. Fast paths are tested against these.

Shapes: T num_tokens, H query heads, G key/value heads, D head_dim, R rank.
"""

from collections.abc import Sequence

import torch


def visible(num_tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[T, T] bool: query i sees keys max(0, i - window + 1) ... i; the window counts the token itself."""
    position = torch.arange(num_tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def varlen_attention(
    query: torch.Tensor,  # [T, H, D]
    key: torch.Tensor,  # [T, G, D]
    value: torch.Tensor,  # [T, G, D]
    seqlens: Sequence[int],  # tokens of each sequence, in packed order; they sum to T
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:  # [T, H, D]
    """Causal attention within each packed sequence. Scores are softcap * tanh(score / softcap) where it is given."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(query.split(list(seqlens)), key.split(list(seqlens)), value.split(list(seqlens)), strict=True):
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q.float(), k.float()) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible(len(q), window, q.device), float("-inf"))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), v.float()).to(query.dtype))
    return torch.cat(outputs)


def lora_delta(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """x [T, in], lora_A [R, in], lora_B [out, R] -> [T, out]."""
    return (x @ lora_A.T) @ lora_B.T * scaling
