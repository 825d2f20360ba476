"""Gradients scaled by their second moments before they are clipped, and back after the noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from dptorch.errors import ConfigurationError

__all__ = ["MomentScaling", "Scaled"]


class Scaled(nn.Module):
    """A network the gradients of whose parameters arrive scaled, coordinate by coordinate.

    Outputs are those of the network, bit for bit. A `MomentScaling` sets the scales.

    Args:
        network: any module.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.scales: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the class."""
        if not self.training or not self.scales:
            return self.network(*args, **kwargs)
        parameters = dict(self.network.named_parameters())
        scaled = {}
        for name, scale in self.scales.items():
            p = parameters[name]
            scaled[name] = p.detach() + scale * (p - p.detach())
        return functional_call(self.network, scaled, args, kwargs)


class MomentScaling:
    """Scales gradients by their second moments before they are clipped, and back after the noise.

    This is scale-then-privatize, after Ganesh, McMahan and Thakurta, "On Design Principles for Private
    Adaptive Optimizers" (2025).
    A coordinate whose gradients are small gets less noise, one whose gradients are large gets more.
    With the noisy gradient g_t of step t, coordinate by coordinate::

        w_t = β w_(t-1) + (1 - β) g_t² / mean(g_t²),    w_0 = 1
        s_t = ((1 - floor) w_t + floor)^(-1/2)

    Step t + 1 clips s_t times an example's gradient, adds the noise of any step, and divides by s_t:
    this is the gradient that the optimizer steps on. The mean of 1 / s² over all coordinates is 1, so
    that the noise has the power that it has without scaling, and the clipping norm means the same.

    Args:
        scaled: the model that is trained; see `Scaled`.
        optimizer: any `torch.optim` optimizer but LBFGS, before or after an engine is attached to it.
            Filters of the same optimizer's gradients are made after this.
        beta: how slowly the second moments are forgotten, in [0, 1). 0.9 remembers about ten steps.
        floor: share of the noise that is spread evenly, in (0, 1].
        second_moments: of the gradients by parameter name, to begin with; of PUBLIC data. They need not
            be normalised. Names are those of `scaled.network`.

    Guarantees:
        Scales are functions of noisy gradients and of `second_moments`. One example moves the scaled
        sum by at most the clipping norm, to which the noise is calibrated, so that a step costs what it
        costs without. A run that goes on from `state_dict` is the run that was not interrupted.
        Held by `test_the_scaled_step_is_that_of_the_formula`,
        `test_an_example_moves_the_scaled_sum_by_at_most_the_clipping_norm`,
        `test_the_noise_is_scaled_back`, `test_scales_are_functions_of_noisy_gradients` and
        `test_a_run_with_scaled_gradients_resumes`.

    Raises:
        ConfigurationError: a setting is out of its range, or the moments are not those of the model.

    Example:
        >>> model = Scaled(nn.Linear(2, 1, bias=False))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> moments = {"weight": torch.tensor([[4.0, 1.0]])}
        >>> kept = MomentScaling(model, optimizer, second_moments=moments)
        >>> weight = model.network.weight
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> weight.grad.flatten().tolist()  # 1 each without scales
        [0.792..., 1.569...]
        >>> optimizer.step()
        >>> weight.grad.flatten().tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        scaled: Scaled,
        optimizer: Optimizer,
        *,
        beta: float = 0.9,
        floor: float = 0.01,
        second_moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not 0 <= beta < 1:
            raise ConfigurationError(
                f"moment_scaling={beta!r}: expected a coefficient in [0, 1), such as 0.9."
            )
        if not 0 < floor <= 1:
            raise ConfigurationError(f"floor={floor!r}: expected a share in (0, 1], such as 0.01.")
        self.beta, self.floor = beta, floor
        self._scaled = scaled
        self._weights = {n: p for n, p in scaled.network.named_parameters() if p.requires_grad}
        self._moments = {
            n: torch.ones_like(p, requires_grad=False) for n, p in self._weights.items()
        }
        if second_moments is not None:
            self._begin(second_moments)
        optimizer.register_step_pre_hook(self._before_step)

    def _begin(self, second_moments: Mapping[str, Tensor]) -> None:
        expected = {name: tuple(p.shape) for name, p in self._weights.items()}
        found = {name: tuple(v.shape) for name, v in second_moments.items()}
        if found != expected:
            wrong = sorted(n for n in found.keys() | expected if found.get(n) != expected.get(n))
            raise ConfigurationError(
                f"second_moments: {wrong[0]!r} has the shape {found.get(wrong[0])}, expected "
                f"{expected.get(wrong[0])}. Give one tensor for each trainable parameter of "
                "scaled.network, by its name."
            )
        if not all(bool((v >= 0).all()) for v in second_moments.values()):
            raise ConfigurationError(
                "second_moments has values below 0 or that are no numbers. Give means of squares."
            )
        moments = {n: v.to(self._weights[n]).clone() for n, v in second_moments.items()}
        mean = _mean(moments)
        if not 0 < mean < float("inf"):
            raise ConfigurationError(
                f"second_moments have the mean {mean}: expected a positive number."
            )
        self._moments = {name: v / mean for name, v in moments.items()}
        self._set_scales()

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        squares = {}
        for name, p in self._weights.items():
            if p.grad is None:
                continue
            scale = self._scaled.scales.get(name)
            if scale is not None:
                p.grad.div_(scale)
            squares[name] = p.grad.square()
        mean = _mean(squares)
        if not 0 < mean < float("inf"):
            return
        for name, square in squares.items():
            self._moments[name].lerp_(square / mean, 1 - self.beta)
        self._set_scales()

    def _set_scales(self) -> None:
        total = _mean(self._moments)  # 1, but where a parameter had no gradient
        self._scaled.scales = {
            name: ((1 - self.floor) * v / total + self.floor).rsqrt()
            for name, v in self._moments.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the scaling needs to go on."""
        return {
            "beta": self.beta,
            "floor": self.floor,
            "moments": dict(self._moments),
            "scales": dict(self._scaled.scales),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.beta, self.floor = state_dict["beta"], state_dict["floor"]
        self._moments, self._scaled.scales = (
            {name: v.to(self._weights[name].device) for name, v in state_dict[key].items()}
            for key in ("moments", "scales")
        )


def _mean(values: Mapping[str, Tensor]) -> float:
    """Of all coordinates of all tensors; 0 for none."""
    count = sum(v.numel() for v in values.values())
    return sum(float(v.double().sum()) for v in values.values()) / max(1, count)
