"""A low-pass filter of noisy gradients: their noise is new in each step, and the gradient is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dptorch.errors import ConfigurationError

__all__ = ["LowPassFilter"]


class LowPassFilter:
    """Replaces the gradients of an optimizer's steps by filtered ones.

    A filter of first order with its zero at the highest frequency (DOPPLER: Zhang et al., "Doppler:
    Differentially Private Optimizers with Low-pass Filter for Privacy Noise Reduction", NeurIPS 2024),
    without the bias of its beginning at zero::

        m_t = a m_(t-1) + (1 - a) / 2 (g_t + g_(t-1)),    c_t = the same for a gradient of ones

    and the step takes m_t / c_t. The filtered gradient of step 1 is the gradient itself.

    Args:
        optimizer: any `torch.optim` optimizer but LBFGS, before or after an engine is attached to it.
        a: feedback coefficient, in [0, 1). 0 averages two steps; 0.9 remembers about ten.

    Guarantees:
        Filtered gradients are functions of the optimizer's gradients alone: of noisy ones, with an
        engine. A run that goes on from `state_dict` is the run that was not interrupted.
        Held by `test_a_filtered_gradient_is_that_of_the_recurrence`,
        `test_the_filter_sees_noisy_gradients_only` and
        `test_a_run_with_a_filter_and_an_average_resumes`.

    Raises:
        ConfigurationError: `a` is outside [0, 1).

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> kept = LowPassFilter(optimizer, a=0.0)
        >>> for gradient in (1.0, -1.0):
        ...     weight.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> weight.item()  # -1, and then the average of 1 and -1
        -1.0
    """

    def __init__(self, optimizer: Optimizer, a: float = 0.9) -> None:
        if not 0 <= a < 1:
            raise ConfigurationError(
                f"low_pass={a!r}: expected a coefficient in [0, 1), such as 0.9."
            )
        self.a = a
        self._optimizer = optimizer
        self._filtered: list[Tensor | None] = []
        self._last: list[Tensor | None] = []
        self._scale = self._ones = 0.0
        optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        parameters = _parameters(optimizer)
        if not self._filtered:
            self._filtered = [None] * len(parameters)
            self._last = [None] * len(parameters)
        new = (1 - self.a) / 2
        self._scale = self.a * self._scale + new * (1.0 + self._ones)
        self._ones = 1.0
        for i, p in enumerate(parameters):
            if p.grad is None:
                continue
            before, last = self._filtered[i], self._last[i]
            value = p.grad * new if last is None else (p.grad + last) * new
            if before is not None:
                value += self.a * before
            self._filtered[i], self._last[i] = value, p.grad.clone()
            p.grad.copy_(value / self._scale)

    def state_dict(self) -> dict[str, Any]:
        """All that the filter needs to go on."""
        return {
            "a": self.a,
            "filtered": list(self._filtered),
            "last": list(self._last),
            "scale": self._scale,
            "ones": self._ones,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.a = state_dict["a"]
        self._scale, self._ones = state_dict["scale"], state_dict["ones"]
        devices = [p.device for p in _parameters(self._optimizer)]
        for name in ("filtered", "last"):
            values = [
                None if t is None else t.to(device)
                for t, device in zip(state_dict[name], devices, strict=False)
            ]
            setattr(self, f"_{name}", values)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
