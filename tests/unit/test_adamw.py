"""The stacked AdamW moves each adapter as PyTorch's own would, and leaves the others where they are."""

import pytest
import torch
from torch import nn

from loraplex.training.adamw import StackedAdamW

NUM_ADAPTERS, SHAPES = 3, ((4, 6), (5, 4), (7,))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_each_adapter_moves_as_with_an_optimizer_of_its_own(weight_decay: float) -> None:
    torch.manual_seed(0)
    stacked = [nn.Parameter(torch.randn(NUM_ADAPTERS, *shape)) for shape in SHAPES]
    alone = [[nn.Parameter(one[adapter].detach().clone()) for one in stacked] for adapter in range(NUM_ADAPTERS)]
    optimizer = StackedAdamW(stacked, weight_decay=weight_decay, max_norm=2.0)
    others = [torch.optim.AdamW(parameters, lr=1.0, weight_decay=weight_decay) for parameters in alone]
    for step in range(8):
        included = torch.tensor([True, step % 2 == 0, step != 3])
        rates = torch.tensor([0.1, 0.01, 0.05]) / (step + 1)
        gradients = [torch.randn_like(one) * 3 for one in stacked]
        for parameter, gradient in zip(stacked, gradients, strict=True):
            parameter.grad = gradient.clone()
        norms = optimizer.step(rates, included)
        assert all(parameter.grad is None for parameter in stacked)
        for adapter in range(NUM_ADAPTERS):
            if not included[adapter]:
                continue
            for parameter, gradient in zip(alone[adapter], gradients, strict=True):
                parameter.grad = gradient[adapter].clone()
            expected = torch.nn.utils.clip_grad_norm_(alone[adapter], 2.0)
            torch.testing.assert_close(norms[adapter], expected)
            others[adapter].param_groups[0]["lr"] = float(rates[adapter])
            others[adapter].step()
    for adapter in range(NUM_ADAPTERS):
        for parameter, one in zip(stacked, alone[adapter], strict=True):
            torch.testing.assert_close(parameter[adapter], one, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = StackedAdamW([parameter])
    parameter.grad = torch.tensor([[1.0, 1.0, 1.0], [1.0, float("nan"), 1.0]])
    norms = optimizer.step(torch.tensor([0.1, 0.1]), torch.tensor([True, True]))
    assert norms.isfinite().tolist() == [True, False] and parameter.grad is None
    assert torch.equal(parameter, torch.ones(2, 3)) and not optimizer.state()["steps"].any()


def test_a_state_goes_on_where_it_was() -> None:
    def run(num_first: int) -> torch.Tensor:
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.randn(2, 3))
        optimizer = StackedAdamW([parameter])
        for step in range(6):
            if step == num_first:
                state = {
                    name: [one.clone() for one in value] if isinstance(value, list) else value.clone()
                    for name, value in optimizer.state().items()
                }
                optimizer = StackedAdamW([parameter])
                optimizer.load_state(state)
            parameter.grad = torch.full((2, 3), float(step + 1))
            optimizer.step(torch.tensor([0.1, 0.2]), torch.tensor([True, step != 2]))
        return parameter.detach()

    torch.testing.assert_close(run(3), run(99), rtol=0, atol=0)
