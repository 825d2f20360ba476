"""Adaptive clipping: the norm follows a quantile of the gradient norms, privately.

Andrew, Thakkar, McMahan & Ramaswamy 2021, arXiv:1905.03871. Each step also releases, with noise of
its own, how many gradients were no longer than the norm, and moves the norm towards the one that
the wanted fraction of gradients fits in. Sum and count together cost what the plan says: the sum
gets a little more noise to make room for the count (their Theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dptorch.accounting.arguments import number
from dptorch.clipping.functions import LEAST_NORM
from dptorch.clipping.groups import ClippingGroup
from dptorch.errors import ConfigurationError, one_of

__all__ = ["COUNTS", "AdaptiveClipping", "noise_scales"]

#: Name of the counts among the values of a clipped sum; no parameter can have it.
COUNTS = "(examples within the clipping norm)"
# One example moves a centred count, of +1/2 or -1/2, by this much when it joins or leaves.
_COUNT_SENSITIVITY = 0.5


@dataclass(frozen=True)
class AdaptiveClipping:
    """Settings of adaptive clipping: how the norm follows the gradients.

    Attributes:
        quantile: fraction of gradients that should not be clipped.
        learning_rate: the norm is multiplied by ``exp(-learning_rate * (fraction - quantile))``.
        count_stddev: standard deviation of the noise on each count of examples; by default a
            twentieth of the expected batch size.
        min_norm, max_norm: the norm does not move out of these; None for no bound but `LEAST_NORM`.

    Example:
        >>> AdaptiveClipping().follow([1.0], torch.tensor([50.0]), expected_batch_size=100)[0] < 1
        True
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_stddev: float | None = None
    min_norm: float | None = None
    max_norm: float | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("quantile", self.quantile, 0, 1),
            ("learning_rate", self.learning_rate, 0, math.inf),
            ("count_stddev", self.count_stddev, 0, math.inf),
            ("min_norm", self.min_norm, 0, math.inf),
            ("max_norm", self.max_norm, self.min_norm or 0, math.inf),
        ):
            if value is not None and not low < number(name, value) < high:
                raise ConfigurationError(
                    f"adaptive clipping: {name}={value!r} must lie between {low} and {high}."
                )

    @classmethod
    def of(cls, value: Any) -> AdaptiveClipping | None:
        """Read what a user wrote: True for the defaults, a quantile, a mapping, or the object."""
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, Mapping):
            for name in value:
                one_of("adaptive_clipping", name, (field.name for field in fields(cls)))
            return cls(**value)
        return value if isinstance(value, cls) else cls(number("adaptive_clipping", value))

    def stddev(self, expected_batch_size: float) -> float:
        """Standard deviation of the noise on a count."""
        return self.count_stddev or expected_batch_size / 20

    def follow(
        self, norms: Sequence[float], noisy_counts: Tensor, expected_batch_size: float
    ) -> list[float]:
        """Return the norms for the next step.

        Args:
            norms: of each group.
            noisy_counts: for each group, the sum of +1/2 for every example within the norm and -1/2
                for every other, with noise.
            expected_batch_size: the public number that makes a fraction of it.
        """
        # Noise may carry a fraction out of [0, 1], from where the norm would leap.
        fractions = (noisy_counts.double() / expected_batch_size + 0.5).clamp(0, 1).tolist()
        low, high = max(self.min_norm or 0.0, LEAST_NORM), self.max_norm or math.inf
        rate = self.learning_rate
        moved = (
            n * math.exp(-rate * (f - self.quantile)) for n, f in zip(norms, fractions, strict=True)
        )
        return [min(max(n, low), high) for n in moved]


def noise_scales(
    groups: Sequence[ClippingGroup],
    norms: Sequence[float],
    adaptive: AdaptiveClipping | None,
    noise_multiplier: float,
    expected_batch_size: float,
) -> dict[str, float]:
    """Standard deviation of each value's noise for each unit of noise multiplier.

    Args:
        groups: for their parameters and noise weights w_g.
        norms: each group's present norm C_g.
        adaptive: makes room for the counts, if given.
        noise_multiplier: the plan's z, for sum and counts together.
        expected_batch_size: see `AdaptiveClipping.stddev`.

    Guarantees:
        ``sum_g (C_g / scale_g)^2 + sum_g (1/2 / count scale)^2 <= 1``: an example moves everything
        that is released by at most one unit of noise multiplier.
        Held by `test_sum_and_counts_cost_together_what_the_plan_says`.

    Raises:
        ConfigurationError: if the counts alone would cost more than the plan.
    """
    room = 1.0
    scales = {}
    if adaptive is not None:
        # Without noise any scale serves, as long as it divides.
        scales[COUNTS] = 1.0
    if adaptive is not None and noise_multiplier:
        stddev = adaptive.stddev(expected_batch_size)
        scales[COUNTS] = stddev / noise_multiplier
        room -= len(groups) * (_COUNT_SENSITIVITY / scales[COUNTS]) ** 2
        if room <= 0:
            least = math.sqrt(len(groups)) * _COUNT_SENSITIVITY * noise_multiplier
            raise ConfigurationError(
                f"adaptive clipping: noise of standard deviation {stddev:g} on each of "
                f"{len(groups)} counts costs more than the whole plan. Use count_stddev well above "
                f"{least:g}."
            )
    for group, norm in zip(groups, norms, strict=True):
        # What the counts leave of the one unit by which an example may move all that is released.
        scale = norm / math.sqrt(group.noise_weight * room)
        scales |= dict.fromkeys(group.parameters, scale)
    return scales


def centred_counts(fits: Tensor) -> Tensor:
    """[groups, B] of 1 for an example within the norm and 0 otherwise -> the sums that are released."""
    return (fits - _COUNT_SENSITIVITY).sum(1).to(torch.float32)
