"""What is patched into transformers' models computes what it replaces."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tiny
from loraplex.model.hooked import ATTENTION, replace_norms


def random_model(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.FAMILIES[family], attn_implementation=ATTENTION)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.inference_mode()
def test_every_norm_is_same_and_gives_the_same(family: str) -> None:
    model = random_model(family, torch.float32)
    norms = {path: module for path, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    inputs = {path: torch.randn(5, len(norm.weight)) for path, norm in norms.items()}
    expected = {path: norm(inputs[path]) for path, norm in norms.items()}
    replace_norms(model)
    for path, norm in norms.items():
        assert "forward" in vars(norm), f"{path} was not replaced"
        torch.testing.assert_close(norm(inputs[path]), expected[path], rtol=1e-6, atol=1e-6)


class OtherRMSNorm(nn.Module):
    """By its name an RMS norm; `change` decides whether it computes one."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.eps, self.change = nn.Parameter(torch.full((8,), 0.5)), 1e-6, change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(nn.functional.rms_norm(x, (8,), self.weight, self.eps))


@pytest.mark.parametrize(("change", "is_same"), [(lambda x: x, True), (lambda x: x + 0.01, False), (torch.tanh, False)])
def test_a_norm_that_computes_otherwise_stays(change: Callable[[torch.Tensor], torch.Tensor], is_same: bool) -> None:
    norm = OtherRMSNorm(change)
    replace_norms(nn.Sequential(norm))
    assert ("forward" in vars(norm)) is is_same
