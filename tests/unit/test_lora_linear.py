"""A linear layer with an update a slot."""

import itertools

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.weights import LoRAWeights
from loraplex.model.inputs import Segment, Segments
from loraplex.model.lora_linear import LoRALinear
from loraplex.ops import reference


def test_it_adds_each_segments_delta_at_its_own_rank() -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 8).requires_grad_(False)
    layer = LoRALinear(base)
    adapters = {
        slot: LoRAWeights(lora_A=torch.randn(rank, 6), lora_B=torch.randn(8, rank), scaling=0.5 + slot)
        for slot, rank in ((0, 1), (2, 5))
    }
    for slot, weights in adapters.items():
        layer.set_slot(slot, weights)
    cut = (Segment(-1, 0, 2), Segment(0, 2, 5), Segment(1, 5, 6), Segment(2, 6, 9))
    segments = Segments(cut)
    x = torch.randn(9, 6)
    expected = base(x)
    expected[2:5] += reference.lora_delta(x[2:5], adapters[0].lora_A, adapters[0].lora_B, adapters[0].scaling)
    expected[6:9] += reference.lora_delta(x[6:9], adapters[2].lora_A, adapters[2].lora_B, adapters[2].scaling)
    torch.testing.assert_close(layer(x, segments), expected)
    assert layer.is_active(segments) and not layer.is_active(Segments(cut[:1]))
    layer.clear_slot(2)
    torch.testing.assert_close(layer(x, segments)[6:9], base(x[6:9]))


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
def test_segments_of_one_length_are_computed_together_and_give_the_same(conv1d: bool, is_kept: bool) -> None:
    """The ranks differ, one is far larger. One slot is empty, one adapter has a bias, some segments are longer."""
    torch.manual_seed(0)
    base = (Conv1D(8, 6) if conv1d else torch.nn.Linear(6, 8)).requires_grad_(False)
    layer = LoRALinear(base)
    biased = 4
    adapters = {}
    for slot, rank in enumerate([3, 3, 30, 0, 2, 3, 9, 2, 4, 2]):
        if rank:
            lora_bias = torch.randn(8) if slot == biased else None
            lora_A, lora_B = torch.randn(rank, 6), torch.randn(8, rank)
            adapters[slot] = LoRAWeights(lora_A=lora_A, lora_B=lora_B, scaling=1.0 + slot, lora_bias=lora_bias)
            layer.set_slot(slot, adapters[slot])
    ends = list(itertools.accumulate([2, *[3] * 7, 4, 4, 5]))
    cut = [Segment(slot - 1, start, end) for slot, (start, end) in enumerate(itertools.pairwise([0, *ends]))]
    segments = Segments(cut)
    if is_kept:
        segments.stacked = {}
    x = torch.randn(ends[-1], 6)
    expected = base(x)
    for slot, start, end in cut:
        if slot in adapters:
            lora = adapters[slot]
            expected[start:end] += reference.lora_delta(x[start:end], lora.lora_A, lora.lora_B, lora.scaling)
            if lora.lora_bias is not None:
                expected[start:end] += lora.lora_bias * lora.scaling
    for _ in range(2):
        torch.testing.assert_close(layer(x, segments), expected)
    if segments.stacked is not None:
        [stacks] = segments.stacked.values()
        slots = [tuple(segment.slot for segment in cut[one.first : one.last + 1]) for one in stacks]
        assert slots == [(0, 1), (2,), (4,), (5, 6), (7, 8), (9,)]
