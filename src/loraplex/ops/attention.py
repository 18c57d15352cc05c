"""Attention over packed spans with PyTorch's fused kernels, on CPU and CUDA. One call serves spans that share keys."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from loraplex.ops import reference
from loraplex.ops.layout import Layout, MaskedGroup, Varlen


def packed_attention(
    query: torch.Tensor,  # [T, H, D]
    key: torch.Tensor,  # [T, G, D]
    value: torch.Tensor,  # [T, G, D]
    layout: Layout,
    *,
    cache: tuple[torch.Tensor, torch.Tensor] | None = None,  # keys, values [C, G, D]
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> torch.Tensor:  # [T, H, D]
    """Compute the same as `reference.packed_attention`, faster. Soft-capped scores and sinks run on the reference,
    because no fused kernel here supports them."""
    if softcap is not None or sinks is not None:
        return reference.packed_attention(
            query, key, value, layout, cache=cache, scaling=scaling, window=window, softcap=softcap, sinks=sinks
        )
    if window is not None and window < layout.num_positions:
        return _windowed(query, key, value, layout, cache=cache, scaling=scaling, window=window)
    output, lse = _attend_to_own(query, key, value, layout, scaling=scaling)
    for context in layout.contexts:
        assert lse is not None
        if context.cached is None:
            k, v = key[context.start : context.end], value[context.start : context.end]
        else:
            assert cache is not None, "a span reads the cache, but there is none"
            k, v = cache[0][context.cached], cache[1][context.cached]
        attended, theirs = _attend(query[context.rows], k, v, context.varlen, is_causal=False, scaling=scaling)
        _merge(output, lse, context.rows, attended, theirs)
    for group in layout.groups:
        k, v = (_gathered(group, packed, cache and cache[side]) for side, packed in enumerate((key, value)))
        output[group.rows], _ = _attend(query[group.rows], k, v, is_causal=False, scaling=scaling, mask=group.mask)
    return output


def _empty_like(query: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return an output to fill span by span. Padding is set to zero, because later layers compute it too and it must
    stay finite."""
    output = torch.empty_like(query)
    for start, end in layout.padding:
        output[start:end] = 0
    return output


def _gathered(group: MaskedGroup, packed: torch.Tensor, cached: torch.Tensor | None) -> torch.Tensor:
    """Return the keys or values that the group sees: [num_keys, G, D]."""
    parts = [packed[start:end] for start, end in group.keys]
    if group.cached is not None:
        assert cached is not None, "a span reads the cache, but there is none"
        parts.insert(0, cached[group.cached])
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend_to_own(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, *, scaling: float
) -> tuple[torch.Tensor, torch.Tensor | None]:  # [T, H, D], [T, H] float32
    """Let each span attend causally to itself. Also returns the log-sum-exps, if contexts are merged in later."""
    if _takes_varlen(query):
        if layout.own_keys is not None:
            key, value = key[layout.own_keys], value[layout.own_keys]
        return _attend_varlen(query, key, value, layout.varlen, is_causal=layout.own_keys is None, scaling=scaling)
    output = _empty_like(query, layout)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if layout.contexts else None
    for span in layout.alone:
        rows, keys = slice(*span.queries), slice(span.start, span.end)
        is_causal = span.row is None  # else one query, which sees all keys
        output[rows], own = _attend(query[rows], key[keys], value[keys], is_causal=is_causal, scaling=scaling)
        if lse is not None:
            lse[rows] = own
    return output, lse


def _attend(
    query: torch.Tensor,  # [n, H, D]
    key: torch.Tensor,  # [m, G, D]
    value: torch.Tensor,  # [m, G, D]
    varlen: Varlen | None = None,  # all as one sequence; None: not by the varlen kernel
    *,
    is_causal: bool,
    scaling: float,
    mask: torch.Tensor | None = None,  # [n, m] float32, added to the scores; on CPU only
) -> tuple[torch.Tensor, torch.Tensor]:  # [n, H, D], [n, H] float32
    """Return the attention of all queries to all keys, and the log-sum-exp of the scores."""
    if varlen is not None and _takes_varlen(query):
        return _attend_varlen(query, key, value, varlen, is_causal=is_causal, scaling=scaling)
    if query.is_cuda:
        attend = _attend_efficient if _takes_efficient(query) else _attend_plain
        return attend(query, key, value, is_causal=is_causal, scaling=scaling)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, heads, n, D]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=mask, scale=scaling
    )
    return output[0].transpose(0, 1), lse[0].T


def _takes_varlen(query: torch.Tensor) -> bool:
    """Whether FlashAttention's kernel supports the query: 16-bit, a supported head size, Ampere or newer."""
    dim = query.shape[-1]
    if not query.is_cuda or query.dtype == torch.float32 or dim > 256 or dim % 8:
        return False
    return _compute_capability(query.device) >= (8, 0)


def _takes_efficient(query: torch.Tensor) -> bool:
    """Whether the memory-efficient kernel supports the query. The kernel reads rows 16 bytes at a time."""
    return query.shape[-1] * query.dtype.itemsize % 16 == 0


@functools.cache
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _attend_efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend without materialized scores, which take gigabytes for spans of thousands of tokens. The kernel aligns the
    causal mask to the first query and key, so a causal call needs as many keys as queries."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))  # it takes no grouped key heads
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, H, n, D]
    output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, is_causal, scale=scaling
    )
    return output[0].transpose(0, 1), lse[0, :, : len(query)].T  # the kernel pads the rows


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, varlen: Varlen, *, is_causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let each sequence attend to its own keys, in one call."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    window = (-1, 0 if is_causal else -1)
    options: dict[str, Any] = {"return_aux": AuxRequest(lse=True), "scale": scaling, "window_size": window}
    if _is_told_gqa(varlen_attn):
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    output, lse = varlen_attn(query, key, value, *varlen, **options)
    # Documented as [n, H]; the kernels that PyTorch 2.11 and 2.13 call say [H, n].
    return output, lse.T if lse.shape == (query.shape[1], query.shape[0]) else lse


@functools.cache
def _is_told_gqa(varlen_attn: Callable[..., Any]) -> bool:
    """Whether `varlen_attn` has the argument `enable_gqa`. PyTorch 2.11 takes fewer key heads than query heads without
    the argument."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _attend_plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) * scaling
    if is_causal:
        scores = scores.masked_fill(~reference.visible(len(query), len(key), None, query.device), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return torch.einsum("hij,jhd->ihd", (scores - lse[..., None]).exp(), value), lse.T


def _merge(
    output: torch.Tensor,  # [T, H, D], changed at `rows`
    lse: torch.Tensor,  # [T, H], changed at `rows`
    rows: torch.Tensor | slice,  # [n]
    other: torch.Tensor,  # [n, H, D]
    other_lse: torch.Tensor,  # [n, H]
) -> None:
    """Merge attention to other keys into `output` and `lse`. The result is the attention to the union of both sets of
    keys, computed from the log-sum-exps."""
    total = torch.logaddexp(lse[rows], other_lse)
    own_share, other_share = (lse[rows] - total).exp(), (other_lse - total).exp()  # [n, H]
    output[rows] = (output[rows] * own_share[..., None] + other * other_share[..., None]).to(output.dtype)
    lse[rows] = total


def _windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    *,
    cache: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
    window: int,
) -> torch.Tensor:
    """Attend span by span with an explicit mask, because a window shows each token another part of a shared prefix."""
    output = _empty_like(query, layout)
    for span in layout.spans:
        q, k, v = (
            x.transpose(0, 1).unsqueeze(0)  # [1, heads, n, D]
            for x in (
                query[slice(*span.queries)],
                reference.seen_by(span, key, None if cache is None else cache[0]),
                reference.seen_by(span, value, None if cache is None else cache[1]),
            )
        )
        mask = reference.visible(q.shape[2], k.shape[2], window, q.device)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        output[slice(*span.queries)] = attended[0].transpose(0, 1)
    return output
