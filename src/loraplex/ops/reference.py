"""The meaning of each operation in plain PyTorch. The fast versions are tested against these.

Shapes: T packed tokens, Q queries, H query heads, G key/value heads, D head_dim, R rank, C cache slots.
"""

import torch

from loraplex.ops.layout import Layout, Span


def visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which query sees which key: [num_queries, num_keys] bool.

    The queries have the last positions of the keys. Each sees the keys up to its own position. With a window it sees
    only the last `window` of these, its own position included.
    """
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)
    distance = queries[:, None] - torch.arange(num_keys, device=device)[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def seen_by(span: Span, packed: torch.Tensor, cache: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of `packed` [T, G, D] and `cache` [C, G, D] that the span's last token sees, by position."""
    parts = []
    if span.cached is not None:
        assert cache is not None, "a span reads the cache, but there is none"
        parts.append(cache[span.cached])
    parts += [packed[start:end] for start, end in (*span.ancestors, (span.start, span.end))]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def packed_attention(
    query: torch.Tensor,  # [T, H, D], or [Q, H, D] where the layout's spans name their rows
    key: torch.Tensor,  # [T, G, D]
    value: torch.Tensor,  # [T, G, D]
    layout: Layout,
    *,
    cache: tuple[torch.Tensor, torch.Tensor] | None = None,  # keys, values [C, G, D]
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> torch.Tensor:  # as query
    """Return the attention of each span to the tokens that it sees. With `softcap`, scores are
    softcap * tanh(score / softcap). With `sinks`, each head has one more score, of a token whose value is zero."""
    groups = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    for span in layout.spans:
        rows = slice(*span.queries)
        q = query[rows].float()
        k, v = (
            seen_by(span, packed, None if cache is None else cache[side]).repeat_interleave(groups, dim=1).float()
            for side, packed in enumerate((key, value))
        )
        scores = torch.einsum("ihd,jhd->hij", q, k) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible(len(q), len(k), window, q.device), float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, len(q), 1)), dim=-1)
        shares = scores.softmax(dim=-1)[..., : len(k)]
        output[rows] = torch.einsum("hij,jhd->ihd", shares, v).to(query.dtype)
    return output


def lora_delta(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return what LoRA adds to a layer's output: x [T, in], lora_A [R, in], lora_B [out, R] -> [T, out]."""
    return (x @ lora_A.T) @ lora_B.T * scaling
