"""Layers in the CPU's own format compute what they replace."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from loraplex.model.decoder import Decoder
from loraplex.model.loader import load_model, read_config
from loraplex.model.packed_linear import PackedLinear, can_pack

packs = pytest.mark.skipif(
    not can_pack(nn.Linear(2, 2, dtype=torch.bfloat16)), reason="this CPU does not compute in bfloat16"
)


@packs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300])
@torch.inference_mode()
def test_a_packed_layer_equals_linear(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 80, bias=bias, dtype=torch.bfloat16)
    packed = PackedLinear(layer)
    x = torch.randn(rows, 48, dtype=torch.bfloat16)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-2, atol=1e-2)
    other = torch.randn(rows, 80, dtype=torch.bfloat16)
    exact = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
    for actual, expected in (
        (packed(x, "swish"), nn.functional.silu(exact)),
        (packed.times(x, other), exact * other),
        (packed.plus(x, other), exact + other),
    ):
        torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(packed.weight, layer.weight)


@packs
def test_a_decoder_packs_its_layers_but_not_its_head(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["mistral"])
    model = load_model(read_config(tmp_path), tmp_path, torch.bfloat16, torch.device("cpu"))
    assert isinstance(model, Decoder)
    layers = [one.base_layer for layer in model.layers for one in layer.linears.values()]
    assert len(layers) == 3 * 7 and all(isinstance(one, PackedLinear) for one in layers)
    assert isinstance(model.lm_head.base_layer, nn.Linear)


def test_float32_is_not_packed() -> None:
    assert not can_pack(nn.Linear(2, 2))
