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
    """Multiplies one attribute of a `DPOptimizer` by ``factor(epoch)``.

    Attributes:
        attribute: of the optimizer.
        settings: names of the numbers that the factor depends on; they are part of the state.
    """

    attribute: str
    settings: tuple[str, ...] = ()

    def __init__(self, optimizer: Optimizer, last_epoch: int) -> None:
        if not isinstance(optimizer, DPOptimizer):
            raise ConfigurationError(
                f"{type(self).__name__} needs the optimizer that make_private returned, not "
                f"{type(optimizer).__name__}."
            )
        self.optimizer = optimizer
        self.last_epoch = last_epoch
        self.base = float(getattr(optimizer, self.attribute))
        self.step()

    def factor(self, epoch: int) -> float:
        """What the value is multiplied by at the beginning of `epoch`."""
        raise NotImplementedError

    def begin(self) -> float:
        """The value that is multiplied: the last one."""
        return float(getattr(self.optimizer, self.attribute))

    def step(self) -> None:
        """The next epoch's value."""
        self.last_epoch += 1
        setattr(self.optimizer, self.attribute, self.begin() * self.factor(self.last_epoch))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: getattr(self, name) for name in ("last_epoch", "base", *self.settings)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the value itself belongs to the run."""
        for name in ("last_epoch", "base", *self.settings):
            setattr(self, name, state_dict.get(name, getattr(self, name)))


class _Exponential(_Scheduler):
    """Times `gamma` every epoch."""

    settings = ("gamma",)

    @known_arguments
    def __init__(self, optimizer: Optimizer, *, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def factor(self, epoch: int) -> float:
        return self.gamma if epoch > 0 else 1.0


class _Step(_Scheduler):
    """Times `gamma` every `step_size` epochs."""

    settings = ("gamma", "step_size")

    @known_arguments
    def __init__(
        self, optimizer: Optimizer, *, step_size: int, gamma: float, last_epoch: int = -1
    ) -> None:
        self.gamma, self.step_size = gamma, step_size
        super().__init__(optimizer, last_epoch)

    def factor(self, epoch: int) -> float:
        return self.gamma if epoch > 0 and epoch % self.step_size == 0 else 1.0


class _Lambda(_Scheduler):
    """The first value times a function of the epoch; a checkpoint does not hold the function."""

    def __init__(
        self, optimizer: Optimizer, function: Callable[[int], float], last_epoch: int
    ) -> None:
        self._function = function
        super().__init__(optimizer, last_epoch)

    def factor(self, epoch: int) -> float:
        return self._function(epoch)

    def begin(self) -> float:
        return self.base


class ExponentialNoise(_Exponential):
    """The noise multiplier times `gamma` every epoch.

    Args:
        optimizer: what ``make_private`` returned.
        gamma: the factor.
        last_epoch: where to begin.
    """

    attribute = "noise_multiplier"


class StepNoise(_Step):
    """The noise multiplier times `gamma` every `step_size` epochs."""

    attribute = "noise_multiplier"


class LambdaNoise(_Lambda):
    """The first noise multiplier times ``noise_lambda(epoch)``."""

    attribute = "noise_multiplier"

    @known_arguments
    def __init__(
        self, optimizer: Optimizer, *, noise_lambda: Callable[[int], float], last_epoch: int = -1
    ) -> None:
        super().__init__(optimizer, noise_lambda, last_epoch)


class ExponentialGradClip(_Exponential):
    """The clipping norm times `gamma` every epoch; the noise moves with it."""

    attribute = "max_grad_norm"


class StepGradClip(_Step):
    """The clipping norm times `gamma` every `step_size` epochs."""

    attribute = "max_grad_norm"


class LambdaGradClip(_Lambda):
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
        super().__init__(optimizer, scheduler_function, last_epoch)
