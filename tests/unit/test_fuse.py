"""Fused layers compute what they replace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tiny
from loraplex.model import fuse as fuse_module
from loraplex.model.attention import NAME
from loraplex.model.decoder_layer import FusedLayer, fuse_layers
from loraplex.model.fuse import PackedLinear, can_pack, fuse
from loraplex.model.multi_lora import MultiLoRA

packs = pytest.mark.skipif(
    not can_pack(nn.Linear(2, 2, dtype=torch.bfloat16)), reason="this CPU does not compute in bfloat16"
)


def random_model(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.FAMILIES[family], attn_implementation=NAME)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_every_norm_is_fused_and_gives_the_same(family: str) -> None:
    model = random_model(family, torch.float32)
    norms = {path: module for path, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    inputs = {path: torch.randn(5, len(norm.weight)) for path, norm in norms.items()}
    expected = {path: norm(inputs[path]) for path, norm in norms.items()}
    fuse(model)
    for path, norm in norms.items():
        assert "forward" in vars(norm), f"{path} was not fused"
        torch.testing.assert_close(norm(inputs[path]), expected[path], rtol=1e-6, atol=1e-6)


class OtherRMSNorm(nn.Module):
    """By its name an RMS norm; `change` decides whether it computes one."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.eps, self.change = nn.Parameter(torch.full((8,), 0.5)), 1e-6, change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(nn.functional.rms_norm(x, (8,), self.weight, self.eps))


@pytest.mark.parametrize(("change", "fused"), [(lambda x: x, True), (lambda x: x + 0.01, False), (torch.tanh, False)])
def test_a_norm_that_computes_otherwise_stays(change: Callable[[torch.Tensor], torch.Tensor], fused: bool) -> None:
    norm = OtherRMSNorm(change)
    fuse(nn.Sequential(norm))
    assert ("forward" in vars(norm)) is fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_layers_like_llamas_are_fused(family: str, dtype: torch.dtype) -> None:
    model = random_model(family, dtype)
    fuse(model)
    fuse_layers(model)
    are_fused = {isinstance(layer.forward, FusedLayer) for layer in model.model.layers}
    assert are_fused == {family in ("llama", "mistral", "mistral-window", "qwen2", "qwen3")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [nn.GELU(), nn.ReLU(), nn.Identity()])
@torch.inference_mode()
def test_a_layer_with_another_activation_stays(other: nn.Module, dtype: torch.dtype) -> None:
    model = random_model("llama", dtype)
    model.model.layers[1].mlp.act_fn = other
    fuse_layers(model)
    assert [isinstance(layer.forward, FusedLayer) for layer in model.model.layers] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_layer_that_weighs_what_it_adds_stays(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama", dtype)
    mlp, forward = model.model.layers[2].mlp, model.model.layers[2].mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: 0.8 * forward(x))
    fuse_layers(model)
    assert [isinstance(layer.forward, FusedLayer) for layer in model.model.layers] == [True, True, False]


@packs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300])
@torch.inference_mode()
def test_a_packed_layer_equals_linear(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 80, bias=bias, dtype=torch.bfloat16)
    packed = PackedLinear(layer)
    x = torch.randn(1, rows, 48, dtype=torch.bfloat16)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-2, atol=1e-2)
    other = torch.randn(1, rows, 80, dtype=torch.bfloat16)
    exact = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
    for actual, expected in (
        (packed(x, "swish"), nn.functional.silu(exact)),
        (packed.times(x, other), exact * other),
        (packed.plus(x, other), exact + other),
    ):
        torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(packed.weight, layer.weight)


@packs
def test_packing_leaves_the_head_and_no_second_copy() -> None:
    model = random_model("mistral", torch.bfloat16)
    fuse(model)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert linears == [model.lm_head]
    assert not [path for path, _ in model.named_parameters() if "_proj" in path]


def test_the_last_layer_is_pruned_whether_it_is_packed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN packs float32 too, which stands for the bfloat16 of CPUs that compute in it."""
    monkeypatch.setattr(fuse_module, "can_pack", lambda layer: type(layer) is nn.Linear)
    model = random_model("mistral", torch.float32)
    fuse(model)
    assert isinstance(model.model.layers[-1].self_attn.q_proj, PackedLinear)
    assert MultiLoRA(model).is_pruned


def test_float32_is_not_packed() -> None:
    model = random_model("mistral", torch.float32)
    fuse(model)
    assert not [module for module in model.modules() if isinstance(module, PackedLinear)]
