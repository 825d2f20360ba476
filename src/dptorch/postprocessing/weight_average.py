"""Averages of the weights over the steps: the noise of single steps averages out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dptorch.errors import ConfigurationError

__all__ = ["WeightAverage"]


class WeightAverage:
    """Averages a model's trainable weights over an optimizer's steps.

    With `decay` exponentially, after step t by min(decay, (1 + t) / (10 + t)) as De et al. do
    ("Unlocking High-Accuracy Differentially Private Image Classification through Scale", 2022); without
    it evenly, over all steps after `first_step`, which is called tail averaging.

    Args:
        model: whose weights.
        optimizer: any `torch.optim` optimizer, before or after an engine is attached to it.
        decay: in [0, 1), such as 0.99; None averages evenly.
        first_step: number of steps that are left out at the beginning.

    Guarantees:
        An average is a function of the weights after each step alone. A run that goes on from
        `state_dict` is the run that was not interrupted.
        Held by `test_averages_are_those_of_the_weights_after_each_step` and
        `test_a_run_with_a_filter_and_an_average_resumes`.

    Raises:
        ConfigurationError: `decay` is outside [0, 1).

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> average = WeightAverage(model, optimizer)
        >>> _ = nn.init.zeros_(model.weight)
        >>> for gradient in (-1.0, -2.0):
        ...     model.weight.grad = torch.tensor([[gradient]])
        ...     optimizer.step()
        >>> with average.applied():
        ...     model.weight.item()
        2.0
        >>> model.weight.item()
        3.0
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        decay: float | None = None,
        first_step: int = 0,
    ) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ConfigurationError(f"ema={decay!r}: expected a decay in [0, 1), such as 0.99.")
        self.decay = decay
        self.first_step = first_step
        self._weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._average: dict[str, Tensor] = {}
        self._steps = 0
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self._steps += 1
        step = self._steps - self.first_step
        if step < 1:
            return
        if step == 1:
            self._average = {n: p.detach().clone() for n, p in self._weights.items()}
            return
        kept = (step - 1) / step
        if self.decay is not None:
            kept = min(self.decay, (1 + step) / (10 + step))
        for name, p in self._weights.items():
            self._average[name].lerp_(p.detach(), 1 - kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model its averaged weights, within the context. Do not train in it."""
        own = {name: p.detach().clone() for name, p in self._weights.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._weights[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """All that the average needs to go on."""
        return {"average": dict(self._average), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._steps = state_dict["steps"]
        self._average = {
            name: value.to(self._weights[name]) for name, value in state_dict["average"].items()
        }
