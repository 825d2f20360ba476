"""Schedules of noise and of clipping norms; each change begins a new plan, and all are composed.

Step them once an epoch or once a logical batch. What they multiply by must be public constants: a
schedule that looks at losses or gradients spends privacy that nobody counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from dptorch.compat.arguments import known_arguments
from dptorch.compat.opacus.optimizers import DPOptimizer
from dptorch.errors import ConfigurationError

__all__ = [
    "ExponentialGradClip",
    "ExponentialNoise",
    "LambdaGradClip",
    "LambdaNoise",
    "StepGradClip",
    "StepNoise",
]


class _Scheduler:
    """Multiplies one attribute of a `DPOptimizer` by ``factor(epoch)``: its first value if `from_base`,
    else its last."""

    attribute: str

    def __init__(
        self,
        optimizer: Optimizer,
        factor: Callable[[int], float],
        last_epoch: int,
        *,
        from_base: bool = False,
    ) -> None:
        if not isinstance(optimizer, DPOptimizer):
            raise ConfigurationError(
                f"{type(self).__name__} needs the optimizer that make_private returned, not "
                f"{type(optimizer).__name__}."
            )
        self.optimizer = optimizer
        self.last_epoch = last_epoch
        self.base = float(getattr(optimizer, self.attribute))
        self._factor = factor
        self._from_base = from_base
        self.step()

    def step(self) -> None:
        """The next epoch's value."""
        self.last_epoch += 1
        value = self.base if self._from_base else getattr(self.optimizer, self.attribute)
        setattr(self.optimizer, self.attribute, value * self._factor(self.last_epoch))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"last_epoch": self.last_epoch, "base": self.base}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the value itself belongs to the run."""
        self.last_epoch, self.base = state_dict["last_epoch"], state_dict["base"]


def _exponential(gamma: float) -> Callable[[int], float]:
    return lambda epoch: gamma if epoch > 0 else 1.0


def _steps(step_size: int, gamma: float) -> Callable[[int], float]:
    return lambda epoch: gamma if epoch > 0 and epoch % step_size == 0 else 1.0


class ExponentialNoise(_Scheduler):
    """The noise multiplier times `gamma` every epoch.

    Args:
        optimizer: what ``make_private`` returned.
        gamma: the factor.
        last_epoch: where to begin.
    """

    attribute = "noise_multiplier"

    @known_arguments
    def __init__(self, optimizer: Optimizer, *, gamma: float, last_epoch: int = -1) -> None:
        super().__init__(optimizer, _exponential(gamma), last_epoch)


class StepNoise(_Scheduler):
    """The noise multiplier times `gamma` every `step_size` epochs."""

    attribute = "noise_multiplier"

    @known_arguments
    def __init__(
        self, optimizer: Optimizer, *, step_size: int, gamma: float, last_epoch: int = -1
    ) -> None:
        super().__init__(optimizer, _steps(step_size, gamma), last_epoch)


class LambdaNoise(_Scheduler):
    """The first noise multiplier times ``noise_lambda(epoch)``."""

    attribute = "noise_multiplier"

    @known_arguments
    def __init__(
        self, optimizer: Optimizer, *, noise_lambda: Callable[[int], float], last_epoch: int = -1
    ) -> None:
        super().__init__(optimizer, noise_lambda, last_epoch, from_base=True)


class ExponentialGradClip(_Scheduler):
    """The clipping norm times `gamma` every epoch; the noise moves with it."""

    attribute = "max_grad_norm"

    @known_arguments
    def __init__(self, optimizer: Optimizer, *, gamma: float, last_epoch: int = -1) -> None:
        super().__init__(optimizer, _exponential(gamma), last_epoch)


class StepGradClip(_Scheduler):
    """The clipping norm times `gamma` every `step_size` epochs."""

    attribute = "max_grad_norm"

    @known_arguments
    def __init__(
        self, optimizer: Optimizer, *, step_size: int, gamma: float, last_epoch: int = -1
    ) -> None:
        super().__init__(optimizer, _steps(step_size, gamma), last_epoch)


class LambdaGradClip(_Scheduler):
    """The first clipping norm times ``scheduler_function(epoch)``."""

    attribute = "max_grad_norm"

    @known_arguments
    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scheduler_function: Callable[[int], float],
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, scheduler_function, last_epoch, from_base=True)
