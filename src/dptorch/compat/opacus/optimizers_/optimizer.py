"""`DPOptimizer`: what an optimizer is, and what can be read and set on it, once it is private."""

from __future__ import annotations

from torch.optim import Optimizer

from dptorch.compat.opacus.scheduled_run import ScheduledRun

__all__ = ["DPOptimizer", "as_dp_optimizer"]


class DPOptimizer(Optimizer):
    """The user's own optimizer, whose ``step`` applies noisy gradients.

    Setting `noise_multiplier` or `max_grad_norm` continues the run under a new plan, see
    `ScheduledRun.change`. Every step is accounted at the noise it had.
    """

    _dp_run: ScheduledRun

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
