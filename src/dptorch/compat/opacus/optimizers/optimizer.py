"""`DPOptimizer`: the type of an optimizer that was made private."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from dptorch.compat.opacus.scheduled_run import ScheduledRun
from dptorch.compat.stand_ins import stand_in
from dptorch.errors import ConfigurationError, PrivacyError

__all__ = ["DPOptimizer", "as_dp_optimizer"]

_OWN_CLIPPING: Final = (
    "clipping and noise happen inside step(). For per-example gradients use dptorch.record(model)"
)
_NOT_HERE: Final[Mapping[str, str]] = {
    "grad_samples": _OWN_CLIPPING,
    "clip_and_accumulate": _OWN_CLIPPING,
    "add_noise": _OWN_CLIPPING,
    "scale_grad": _OWN_CLIPPING,
    "pre_step": _OWN_CLIPPING,
    "accumulated_iterations": _OWN_CLIPPING,
    "attach_step_hook": "use register_step_pre_hook(lambda optimizer, *_: hook(optimizer)); steps are "
    "counted without a hook",
    "signal_skip_step": "use BatchMemoryManager, or optimizer.virtual_step() in the place of step()",
}


_generate_noise = stand_in(
    "_generate_noise", "Noise is added inside step(), from a key of the run: leave the call out."
)


class DPOptimizer(Optimizer):
    """The user's own optimizer, whose ``step`` applies noisy gradients.

    Setting `noise_multiplier` or `max_grad_norm` continues the run under a new plan, see
    `ScheduledRun.change`. Every step is accounted at the noise it had.
    """

    _dp_run: ScheduledRun

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: an optimizer is made private together with its model and loader.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            "a DPOptimizer cannot be made alone: clipping and noise need the model and the loader too. "
            "Call PrivacyEngine().make_private(module=, optimizer=, data_loader=, noise_multiplier=, "
            "max_grad_norm=)."
        )

    def __getattr__(self, name: str) -> Any:
        if name in _NOT_HERE:
            raise AttributeError(f"DPOptimizer has no {name} in dptorch: {_NOT_HERE[name]}.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def step(self, closure: Any = None) -> Any:
        """Take the optimizer's own step, for the engine, which wraps this method.

        Raises:
            PrivacyError: the model was taken off its engine, so there is no noisy gradient.
        """
        if self._dp_run.ended:
            raise PrivacyError(
                "this optimizer no longer takes private steps: the hooks of its model were removed, or "
                "make_private was called again with another optimizer. Step with the optimizer that "
                "the last make_private returned, or make a new one for training without privacy."
            )
        return super().step() if closure is None else super().step(closure)

    @property
    def params(self) -> list[nn.Parameter]:
        """All parameters, group by group."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over max_grad_norm."""
        return self._dp_run.plan.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self._dp_run.change(noise_multiplier=value)

    @property
    def max_grad_norm(self) -> float:
        """Bound on one example's contribution; it moves under adaptive clipping."""
        return self._dp_run.engine.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._dp_run.change(max_grad_norm=value)

    @property
    def expected_batch_size(self) -> float:
        """What noisy sums are divided by under a mean loss."""
        return self._dp_run.plan.expected_batch_size

    @property
    def loss_reduction(self) -> str:
        """How the loss joins the examples."""
        return self._dp_run.plan.loss_reduction

    @property
    def original_optimizer(self) -> Optimizer:
        """This object: the optimizer is not wrapped."""
        return self


def as_dp_optimizer(optimizer: Optimizer, run: ScheduledRun) -> DPOptimizer:
    """The same object, now a `DPOptimizer` too."""
    kind = type(optimizer)
    if not isinstance(optimizer, DPOptimizer):
        optimizer.__class__ = type(f"DP{kind.__name__}", (DPOptimizer, kind), {})
    assert isinstance(optimizer, DPOptimizer)
    optimizer._dp_run = run
    return optimizer
