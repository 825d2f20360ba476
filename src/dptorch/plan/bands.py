"""How many bands the noise of a run should have: what each number costs, and the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from dptorch import accounting
from dptorch.accounting import Adjacency, CyclicGaussian, Event, Workload, workload_error
from dptorch.accounting.toeplitz import coefficients_of
from dptorch.errors import ConfigurationError
from dptorch.sampling import most_bands

__all__ = ["BandChoice", "Coefficients", "best_bands", "compare_bands"]

Coefficients: TypeAlias = str | Workload | Sequence[float]


@dataclass(frozen=True)
class BandChoice:
    """What a number of bands gives, at one budget.

    Attributes:
        bands: b; 1 is independent noise.
        noise_multiplier: σ for which the run spends the budget, for columns of norm 1.
        error: root mean square, over steps and coordinates, of the noise in the sums of gradients that
            SGD's parameters are, in units of max_grad_norm (and of the learning rate).
        coefficients: of the noise.
    """

    bands: int
    noise_multiplier: float
    error: float
    coefficients: tuple[float, ...]


def compare_bands(
    *,
    sample_rate: float,
    steps: int,
    target_epsilon: float,
    delta: float,
    accountant: str = "pld",
    adjacency: Adjacency | str = Adjacency.ZERO_OUT,
    coefficients: Coefficients = "prefix-sum",
    bands: Sequence[int] | None = None,
    every: bool = True,
) -> list[BandChoice]:
    """What numbers of bands give at one budget, in their order.

    More bands let later steps take back more of the noise, but leave less amplification by sampling:
    a record's group has its turn less often, and is drawn from at a higher rate then.

    Args:
        sample_rate, steps, target_epsilon, delta, accountant, adjacency: of the run.
        coefficients: see `dptorch.accounting.toeplitz.coefficients_of`; a `Workload` is also what the
            error is of, by default it is that of the prefix sum.
        bands: which numbers; by default powers of two and the most that the rate allows.
        every: whether to go on after two that are worse than the best.

    Raises:
        ConfigurationError: a number is out of range, or the budget out of reach.

    Example:
        >>> found = compare_bands(sample_rate=1 / 16, steps=64, target_epsilon=8.0, delta=1e-5)
        >>> [choice.bands for choice in found], best_bands(found).bands
        ([1, 2, 4, 8, 16], 8)
    """
    most = min(steps, most_bands(sample_rate))
    if bands is None:
        powers = [2**i for i in range(most.bit_length())]
        bands = sorted({*powers, most})
    workload = coefficients if isinstance(coefficients, Workload) else None
    found: list[BandChoice] = []
    for b in bands:
        if b > most:
            raise ConfigurationError(
                f"bands={b} at sample_rate={sample_rate:.6g} and steps={steps}: at most {most} groups "
                "can take turns."
            )
        noise = accounting.noise_multiplier_for(
            partial(_run, bands=b, rate=min(1.0, b * sample_rate), steps=steps),
            target_epsilon=target_epsilon,
            delta=delta,
            accountant=accountant,
            adjacency=adjacency,
        )
        c = coefficients_of(b, steps, coefficients)
        error = noise * float(np.linalg.norm(c)) * workload_error(c, steps, workload)
        found.append(BandChoice(b, noise, error, tuple(c.tolist())))
        if not every and found.index(best_bands(found)) < len(found) - 2:
            break
    return found


def _run(noise_multiplier: float, *, bands: int, rate: float, steps: int) -> Event:
    return CyclicGaussian(noise_multiplier, rate, bands, steps)


def best_bands(choices: Sequence[BandChoice]) -> BandChoice:
    """The choice with the least error."""
    return min(choices, key=lambda choice: choice.error)
