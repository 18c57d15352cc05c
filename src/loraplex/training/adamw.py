"""AdamW for the parameters of N adapters that lie in one tensor, each adapter with its own steps."""

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import nn


class StackedAdamW:
    """Updates each adapter as an AdamW of its own would, with gradients clipped by the adapter's own norm.

    The first dimension of each parameter is the adapter's. An adapter that is not in a step is not touched by it.
    """

    def __init__(
        self,
        parameters: Seq[nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float = 1.0,
    ) -> None:
        self._parameters, self._betas, self._eps = list(parameters), betas, eps
        self._weight_decay, self._max_norm = weight_decay, max_norm
        self._first = [torch.zeros_like(one) for one in self._parameters]
        self._second = [torch.zeros_like(one) for one in self._parameters]
        self._steps = torch.zeros(len(self._parameters[0]), device=self._parameters[0].device)

    @torch.no_grad()
    def step(self, rates: torch.Tensor, included: torch.Tensor) -> torch.Tensor:
        """Update the adapters that are `included`, [num_adapters] of booleans, and drop all gradients.

        rates:  learning rate of each adapter.
        Returns each adapter's gradient norm before it was clipped. Where one of them is infinite or no number, nothing
        is updated.
        """
        gradients = [one.grad if one.grad is not None else torch.zeros_like(one) for one in self._parameters]
        squares = [torch.linalg.vector_norm(one, dim=tuple(range(1, one.ndim))).square() for one in gradients]
        norms = torch.stack(squares).sum(0).sqrt()
        if not bool(norms[included].isfinite().all()):
            for parameter in self._parameters:
                parameter.grad = None
            return norms
        clip = (self._max_norm / (norms + 1e-6)).clamp(max=1.0)
        self._steps += included
        beta1, beta2 = self._betas
        steps = self._steps.clamp(min=1)
        moves = rates / (1 - beta1**steps) * included
        roots = (1 - beta2**steps).sqrt()
        decay = 1 - rates * self._weight_decay * included
        all_included = bool(included.all())
        for parameter, gradient, first, second in zip(
            self._parameters, gradients, self._first, self._second, strict=True
        ):
            shape = (-1, *[1] * (parameter.ndim - 1))
            gradient = gradient * clip.view(shape)
            if all_included:
                first.lerp_(gradient, 1 - beta1)
                second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            else:
                mask = included.view(shape)
                first.copy_(torch.where(mask, first.lerp(gradient, 1 - beta1), first))
                second.copy_(torch.where(mask, second * beta2 + (1 - beta2) * gradient.square(), second))
            parameter.mul_(decay.view(shape))
            parameter.sub_(moves.view(shape) * first / (second.sqrt() / roots.view(shape) + self._eps))
            parameter.grad = None
        return norms

    def state(self) -> dict[str, Any]:
        """Return what `load_state` takes."""
        return {"first": self._first, "second": self._second, "steps": self._steps}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in ("first", "second"):
            for own, saved in zip(getattr(self, f"_{name}"), state[name], strict=True):
                own.copy_(saved)
        self._steps.copy_(state["steps"])
