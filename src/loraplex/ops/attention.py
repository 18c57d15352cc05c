"""Attention over packed sequences by PyTorch's fused kernels, on CPU and CUDA; by the reference where they lack it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from loraplex.ops import reference


def varlen_attention(
    query: torch.Tensor,  # [T, H, D]
    key: torch.Tensor,  # [T, G, D]
    value: torch.Tensor,  # [T, G, D]
    seqlens: Sequence[int],
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:  # [T, H, D]
    """See `reference.varlen_attention`. Soft-capped scores run on the reference: no fused kernel here knows them."""
    if softcap is not None:
        return reference.varlen_attention(query, key, value, seqlens, scaling=scaling, window=window, softcap=softcap)
    output = torch.empty_like(query)
    start = 0
    for num_tokens in seqlens:
        end = start + num_tokens
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, heads, n, D]
        mask = None
        if window is not None and window < num_tokens:
            mask = reference.visible(num_tokens, window, query.device)
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        output[start:end] = attended[0].transpose(0, 1)
        start = end
    return output
