"""Learning rates that follow the number of steps. It is public, so a schedule costs nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from dptorch.errors import ConfigurationError, one_of

__all__ = ["DECAYS", "Schedule", "schedule_of"]

DECAYS: Final = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The share of the learning rate in each step.

    Attributes:
        decay: a name in `DECAYS`: what it falls to 0 by.
        steps: of the whole run.
        warmup: fraction of the steps over which it rises to 1 first.

    Raises:
        ConfigurationError: an unknown decay, or a fraction outside [0, 1).

    Example:
        >>> rising_and_falling = Schedule("linear", steps=10, warmup=0.5)
        >>> [round(rising_and_falling(step), 1) for step in range(10)]
        [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    """

    decay: str
    steps: int
    warmup: float = 0.0

    def __post_init__(self) -> None:
        one_of("decay", self.decay, DECAYS)
        if not 0 <= self.warmup < 1:
            raise ConfigurationError(f"warmup={self.warmup}: expected a fraction in [0, 1).")

    def __call__(self, step: int) -> float:
        """The share after `step` steps are done."""
        first = self.warmup * self.steps
        if step < first:
            return (step + 1) / first if step + 1 < first else 1.0
        done = (step - first) / max(1.0, self.steps - first)
        if self.decay == "linear":
            return max(0.0, 1 - done)
        return 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1.0

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set every learning rate to the share of what its group began with; to 0 before the step
        that a group has as `first_step`."""
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            waits = step < group.get("first_step", 0)
            group["lr"] = 0.0 if waits else group["initial_lr"] * self(step)


def schedule_of(decay: str, steps: int, warmup: float = 0.0) -> tuple[float, ...]:
    """The share of each step, as `dptorch.accounting.Workload` takes them: none for a constant rate.

    Example:
        >>> schedule_of("linear", 4), schedule_of("constant", 4)
        ((1.0, 0.75, 0.5, 0.25), ())
    """
    share = Schedule(decay, steps, warmup)
    return () if decay == "constant" and not warmup else tuple(map(share, range(steps)))
