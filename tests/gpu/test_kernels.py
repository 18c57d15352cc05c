"""The kernels that attention chooses by dtype and head size, against the reference; and a step's copies."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from loraplex.model.loader import default_step_tokens
from loraplex.ops import attention, reference
from loraplex.ops.layout import Layout, Span, layout_of
from loraplex.ops.staging import Staging

pytestmark = pytest.mark.gpu

# FlashAttention takes 64, 128 and 256; 320 is too large, and 20 and 7 are no multiples of what the kernels read.
HEAD_SIZES = [64, 128, 256, 320, 20, 7]


def tree(device: torch.device) -> tuple[Span, ...]:
    """A run on cached tokens, two children of the run, and a text by itself."""
    cached = torch.arange(32, device=device)
    return (
        Span(start=0, end=50, position=32, cached=cached),
        Span(start=50, end=62, position=82, cached=cached, ancestors=((0, 50),)),
        Span(start=62, end=71, position=82, cached=cached, ancestors=((0, 50),)),
        Span(start=71, end=90),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("window", [None, 7])
def test_attention_equals_the_reference(
    device: torch.device, dtype: torch.dtype, head_size: int, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(num_tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(num_tokens, heads, head_size, generator=generator).to(device, dtype)

    query, key, value, cache = random(90, 8), random(90, 2), random(90, 2), (random(64, 2), random(64, 2))
    spans = tree(device)
    last = tuple(replace(span, row=row) for row, span in enumerate(spans))
    staging = Staging(device)
    asked: list[tuple[torch.Tensor, Layout]] = [
        (query, layout_of(spans, staging)),
        (query[[span.end - 1 for span in spans]], layout_of(last, staging)),
    ]
    staging.send()
    for rows, layout in asked:
        actual = attention.packed_attention(
            rows, key, value, layout, cache=cache, scaling=head_size**-0.5, window=window
        )
        expected = reference.packed_attention(
            rows, key, value, layout, cache=cache, scaling=head_size**-0.5, window=window
        )
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_span_needs_no_scores_in_memory(cuda: torch.device, dtype: torch.dtype) -> None:
    """The scores of 8,192 tokens in 32 heads would take 8.6 GB in float32."""
    query = torch.randn(8192, 32, 128, device=cuda, dtype=dtype)
    key = torch.randn(8192, 8, 128, device=cuda, dtype=dtype)
    staging = Staging(cuda)
    layout = layout_of((Span(start=0, end=8192),), staging)
    staging.send()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention.packed_attention(query, key, key, layout, scaling=0.1)
    assert torch.cuda.max_memory_allocated() - before < 2**30


def test_steps_in_a_row_get_their_own_values(device: torch.device) -> None:
    """The host's buffer is filled for the next step while the device may still copy the last one's values."""
    staging, found = Staging(device, is_direct=False), []
    for step in range(20):
        staging.begin()
        numbers = staging.put(range(step, step + 5000))
        flags = staging.put([step] * 7, torch.int32)
        staging.send()
        found.append((numbers.sum(), flags.sum()))
    sums = [(numbers.item(), flags.item()) for numbers, flags in found]
    assert sums == [(sum(range(step, step + 5000)), 7 * step) for step in range(20)]


def test_a_step_fits_into_the_free_memory(cuda: torch.device) -> None:
    large = LlamaConfig(hidden_size=8192, intermediate_size=28672)
    free, _ = torch.cuda.mem_get_info(cuda)
    for dtype in (torch.float32, torch.bfloat16):
        num_tokens = default_step_tokens(cuda, dtype, large)
        assert 256 <= num_tokens <= 16384 // dtype.itemsize
        assert num_tokens * dtype.itemsize * (8 * 8192 + 3 * 28672) <= max(free // 10, 256 * dtype.itemsize * 151552)
