"""Fast paths against the reference, and the reference against a loop that anybody can read."""

import math

import pytest
import torch

from loraplex.adapters.checkpoint import LoRAWeights
from loraplex.model.lora_linear import ActiveSegments, MultiLoRALinear, Segment
from loraplex.ops import attention, reference

SEQLENS = (1, 7, 20, 4)


def packed(heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(SEQLENS), n, 8) for n in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 20])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_equals_the_reference(heads: tuple[int, int], window: int | None, softcap: float | None) -> None:
    query, key, value = packed(*heads)
    settings = {"scaling": 0.3, "window": window, "softcap": softcap}
    expected = reference.varlen_attention(query, key, value, SEQLENS, **settings)  # type: ignore[arg-type]
    actual = attention.varlen_attention(query, key, value, SEQLENS, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_reference_is_causal_attention_with_a_window_and_a_softcap() -> None:
    query, key, value = packed(2, 1)
    actual = reference.varlen_attention(query, key, value, SEQLENS, scaling=0.3, window=3, softcap=1.5)
    start = 0
    for num_tokens in SEQLENS:
        for i in range(num_tokens):
            for head in range(2):
                keys = range(max(0, i - 2), i + 1)
                scores = [1.5 * math.tanh(float(query[start + i, head] @ key[start + j, 0]) * 0.3 / 1.5) for j in keys]
                weights = torch.tensor(scores).softmax(0)
                expected = sum(weight * value[start + j, 0] for weight, j in zip(weights, keys, strict=True))
                torch.testing.assert_close(actual[start + i, head], expected)
        start += num_tokens


def test_multi_lora_linear_adds_each_segments_delta_at_its_own_rank() -> None:
    torch.manual_seed(0)
    segments = ActiveSegments()
    base = torch.nn.Linear(6, 8)
    layer = MultiLoRALinear(base, segments).requires_grad_(False)
    adapters = {
        slot: LoRAWeights(lora_A=torch.randn(rank, 6), lora_B=torch.randn(8, rank), scaling=0.5 + slot)
        for slot, rank in ((0, 1), (2, 5))
    }
    for slot, weights in adapters.items():
        layer.set_slot(slot, weights)
    segments.current = (Segment(-1, 0, 2), Segment(0, 2, 5), Segment(1, 5, 6), Segment(2, 6, 9))
    x = torch.randn(1, 9, 6)
    expected = base(x[0]).detach()
    expected[2:5] += reference.lora_delta(x[0, 2:5], adapters[0].lora_A, adapters[0].lora_B, adapters[0].scaling)
    expected[6:9] += reference.lora_delta(x[0, 6:9], adapters[2].lora_A, adapters[2].lora_B, adapters[2].scaling)
    torch.testing.assert_close(layer(x)[0], expected)
    layer.clear_slot(2)
    torch.testing.assert_close(layer(x)[0, 6:9], base(x[0, 6:9]))
