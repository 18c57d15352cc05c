"""Hooked transformers models: patched modules compute what they replace, and layers are wrapped at any time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tiny
from families import config_of
from loraplex.adapters.weights import AdapterWeights, LoRAWeights
from loraplex.engine.runner import ModelRunner
from loraplex.engine.sequence import SequenceOutput, lone_sequence
from loraplex.engine.step import Step
from loraplex.errors import UnsupportedModelError
from loraplex.model.hooked import ATTENTION, Hooked, replace_norms


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


def test_the_first_adapter_of_the_head_may_come_while_a_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's input is noted whether the step found the layer before or after an adapter was set."""
    model = Hooked(random_model("gemma2", torch.float32))
    path, weight = "lm_head", model.parameter("lm_head.weight")
    assert weight is not None
    lora = LoRAWeights(lora_A=torch.ones(2, weight.shape[1]), lora_B=torch.ones(len(weight), 2), scaling=1.0)
    adapter = AdapterWeights(modules={}, kv_id="00" * 32, output=lora)
    modules: Any = nn.Module
    set_module, found = modules.__setattr__, []

    def while_it_runs(self: nn.Module, name: str, value: Any) -> None:
        runner = ModelRunner(model)
        if name == path:
            found.append(runner.run(Step.of([lone_sequence([5, 6, 7])])))
        set_module(self, name, value)
        if name == path:
            found.append(runner.run(Step.of([lone_sequence([5, 6, 7])])))

    monkeypatch.setattr(modules, "__setattr__", while_it_runs)
    model.set_slot(0, adapter)
    monkeypatch.undo()
    assert len(found) in (0, 2)  # none: the layer is there from the beginning
    [(_, output)] = ModelRunner(model).run(Step.of([lone_sequence([5, 6, 7])]))
    assert isinstance(output, SequenceOutput)


# ------------------------------------------------------------------------ attention that is not like the packed one


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("bert", {}, "attends to later tokens too"),
        ("roberta", {"is_decoder": True, "pad_token_id": 1}, "log probabilities with packed attention differ by"),
        ("diffllama", {}, "layer 0 attends twice in one pass"),
        ("doge", {}, "has a mask of its own"),
        ("xmod", {}, "does not answer a short text: ValueError: Input language unknown"),
    ],
)
def test_attention_that_packed_attention_does_not_compute_is_refused(
    family: str, changes: dict[str, Any], match: str
) -> None:
    config = config_of(family)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    with pytest.raises(UnsupportedModelError, match=match):
        Hooked(model)


@pytest.mark.parametrize(
    ("argument", "is_served"),
    [
        ({"output_router_logits": True}, True),
        ({"anything": None, "asks_for_nothing": False}, True),
        ({"position_bias": torch.ones(1)}, False),
        ({"is_causal": False}, False),
    ],
)
def test_an_argument_of_attention_is_judged_by_what_it_does(argument: dict[str, Any], is_served: bool) -> None:
    model = random_model("gemma2", torch.float32)

    for layer in model.model.layers:
        given: Callable[..., Any] = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, given=given, **kwargs: given(*args, **{**kwargs, **argument})
    if is_served:
        Hooked(model)
    else:
        with pytest.raises(UnsupportedModelError, match=f"uses {next(iter(argument))!r}|later tokens"):
            Hooked(model)
