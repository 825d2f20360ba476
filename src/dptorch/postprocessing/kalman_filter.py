"""A Kalman filter of noisy gradients, which predicts each gradient from the last step (DiSK)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from dptorch.errors import ConfigurationError

__all__ = ["Ahead", "KalmanFilter"]


class Ahead(nn.Module):
    """A network that in training also answers with its weights a part of the last step further on.

    In training it takes inputs [B, ...] and gives outputs [B, 2, ...]: first those of the weights
    x + γ d, where d is the last step, then those of the weights x. In evaluation it is the network.
    A `KalmanFilter` sets d.

    Args:
        network: any module of one input and one output that has examples along dimension 0.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.offsets: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        here: Tensor = self.network(x)
        if not self.training:
            return here
        parameters = dict(self.network.named_parameters())
        moved = {name: parameters[name] + offset for name, offset in self.offsets.items()}
        ahead = functional_call(self.network, moved, (x,)) if moved else here
        return torch.stack([ahead, here], 1)


class KalmanFilter:
    """Replaces the gradients of an optimizer's steps by those of a simplified Kalman filter.

    DiSK (Zhang et al., "DiSK: Differentially Private Optimizer with Simplified Kalman Filter for Noise
    Reduction", ICLR 2025). With d the last step of the weights x, the gradient that is clipped for an
    example and gets the noise is that of::

        loss = a f(x + γ d) + b f(x),    a = (1 - κ) / (κ γ),    b = 1 - a

    and the step takes m_t = (1 - κ) m_(t-1) + κ g_t of these noisy gradients g; m_1 is g_1. A step
    costs two forward and backward passes.

    Args:
        ahead: the model that is trained; see `Ahead`.
        optimizer: any `torch.optim` optimizer but LBFGS, before or after an engine is attached to it.
        kappa: share κ of the new gradient, in (0, 1].
        gamma: how far ahead the second gradient is taken, γ > 0.

    Guarantees:
        d and m are functions of noisy gradients and released weights, so the noise of a step protects
        as it does without the filter: an example's loss above is clipped once. A run that goes on from
        `state_dict` is the run that was not interrupted.
        Held by `test_the_kalman_step_is_that_of_the_formula`,
        `test_the_kalman_gradient_of_each_example_is_clipped_once` and
        `test_a_run_with_a_kalman_filter_resumes`.

    Raises:
        ConfigurationError: κ or γ is out of its range.

    Example:
        >>> model = Ahead(nn.Linear(1, 1, bias=False))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> kept = KalmanFilter(model, optimizer, kappa=0.5, gamma=1.0)
        >>> kept.weights
        (1.0, 0.0)
        >>> model(torch.ones(3, 1)).shape
        torch.Size([3, 2, 1])
    """

    def __init__(
        self, ahead: Ahead, optimizer: Optimizer, *, kappa: float = 0.7, gamma: float = 0.5
    ) -> None:
        if not 0 < kappa <= 1:
            raise ConfigurationError(f"kalman={kappa!r}: expected a share in (0, 1], such as 0.7.")
        if not gamma > 0:
            raise ConfigurationError(f"gamma={gamma!r}: expected a positive number, such as 0.5.")
        self.kappa, self.gamma = kappa, gamma
        self._ahead = ahead
        self._weights = {n: p for n, p in ahead.network.named_parameters() if p.requires_grad}
        self._filtered: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @property
    def weights(self) -> tuple[float, float]:
        """(a, b): what the losses at x + γ d and at x count."""
        a = (1 - self.kappa) / (self.kappa * self.gamma)
        return a, 1 - a

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        for name, p in self._weights.items():
            if p.grad is None:
                continue
            if name in self._filtered:
                self._filtered[name].lerp_(p.grad, self.kappa)
            else:
                self._filtered[name] = p.grad.clone()
            p.grad.copy_(self._filtered[name])
        self._before = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self._ahead.offsets = {
            name: self.gamma * (p.detach() - self._before[name])
            for name, p in self._weights.items()
        }
        self._before = {}

    def state_dict(self) -> dict[str, Any]:
        """All that the filter needs to go on."""
        return {
            "kappa": self.kappa,
            "gamma": self.gamma,
            "filtered": dict(self._filtered),
            "offsets": dict(self._ahead.offsets),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.kappa, self.gamma = state_dict["kappa"], state_dict["gamma"]
        self._filtered, self._ahead.offsets = (
            {name: value.to(self._weights[name].device) for name, value in state_dict[key].items()}
            for key in ("filtered", "offsets")
        )
