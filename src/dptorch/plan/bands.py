"""How many bands the noise of a run should have: what each number costs, and the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dptorch import accounting
from dptorch.accounting import (
    Adjacency,
    BufferedGaussian,
    CyclicGaussian,
    Event,
    SeparatedGaussian,
    Workload,
    workload_error,
)
from dptorch.accounting.arguments import positive_int
from dptorch.accounting.buffered import Buffers, best_buffers
from dptorch.accounting.toeplitz import (
    Coefficients,
    coefficients_of,
    inverse_coefficients_of,
    inverse_error,
)
from dptorch.errors import ConfigurationError
from dptorch.sampling import most_bands

__all__ = [
    "BandChoice",
    "best_bands",
    "best_buffered",
    "best_inverse",
    "compare_bands",
    "compare_mechanisms",
]

# A step draws the noise of as many steps as there are bands of the inverse.
_INVERSE_BANDS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class BandChoice:
    """What a number of bands gives, at one budget.

    Attributes:
        bands: b; 1 is independent noise. Of buffered noise the number of buffers.
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
        >>> found = compare_bands(sample_rate=1 / 16, steps=64, target_epsilon=2.0, delta=1e-5)
        >>> [choice.bands for choice in found], best_bands(found).bands
        ([1, 2, 4, 8, 16], 2)
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
                f"bands={b} at a sampling rate of {sample_rate:.6g} over {steps} steps: at most {most} "
                "groups can take turns."
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


def best_inverse(
    steps: int,
    separation: int,
    bands: int | str | None = "auto",
    coefficients: Coefficients | None = None,
) -> tuple[float, ...]:
    """The coefficients of inverse-banded noise with the least error of the prefix sum.

    Args:
        steps: of the run.
        separation: steps from one participation of a record to its next.
        bands: how many coefficients, or "auto": the best number, 16 at most.
        coefficients: "square-root" (the default), or the numbers themselves.

    Raises:
        ConfigurationError: they cannot be honoured.

    Example:
        >>> len(best_inverse(64, 16)), best_inverse(64, 16, bands=2)
        (8, (1.0, -0.807473))
    """
    if isinstance(coefficients, Workload):
        raise ConfigurationError(
            "a Workload is for mechanism='banded': no coefficients of an inverse are optimised for it. "
            "Leave coefficients= out, or give the numbers themselves."
        )
    wanted = "square-root" if coefficients is None else coefficients
    numbers = list(_INVERSE_BANDS) if bands in (None, "auto") else [int(bands or 1)]
    if not isinstance(wanted, str):
        numbers = [len(wanted)]
    found = [inverse_coefficients_of(b, steps, wanted, separation=separation) for b in numbers]
    best = min(found, key=lambda u: inverse_error(u, steps, separation))
    return tuple(best.tolist())


def best_buffered(
    steps: int,
    separation: int,
    buffers: int | str | None = "auto",
    coefficients: Coefficients | None = None,
) -> tuple[float, ...]:
    """The numbers of buffered Toeplitz noise with the least error of the prefix sum.

    Args:
        steps: of the run.
        separation: steps from one participation of a record to its next.
        buffers: how many, or "auto": as many as lower the error by 2 % each.
        coefficients: "prefix-sum" (the default), or ω and then θ of each buffer.

    Raises:
        ConfigurationError: they cannot be honoured.

    Example:
        >>> best_buffered(64, 16, 1)
        (0.52097, 0.86485)
    """
    if not isinstance(coefficients, str | Workload | None):
        return Buffers.of(tuple(coefficients)).coefficients
    if coefficients not in (None, "prefix-sum"):
        raise ConfigurationError(
            f"coefficients={coefficients!r} with mechanism='buffered-toeplitz': its buffers are found "
            "for the prefix sum alone. Leave coefficients= out, or give the scales and then the decays "
            "of the buffers."
        )
    count = None if buffers in (None, "auto") else positive_int("bands", buffers)
    return best_buffers(steps, separation, count).coefficients


def compare_mechanisms(
    *,
    sample_rate: float,
    steps: int,
    target_epsilon: float,
    delta: float,
    accountant: str = "exact",
    adjacency: Adjacency | str = Adjacency.ZERO_OUT,
) -> dict[str, BandChoice]:
    """What each mechanism gives at one budget, with the best number of bands.

    Returns:
        by the mechanism's name; under add/remove, which does not cover the sampler of those without
        sampling, without "inverse-banded" and "buffered-toeplitz".

    Example:
        >>> found = compare_mechanisms(sample_rate=0.1, steps=100, target_epsilon=8.0, delta=1e-5)
        >>> sorted(found, key=lambda name: found[name].error)
        ['banded', 'buffered-toeplitz', 'inverse-banded', 'gaussian']
    """
    budget: dict[str, Any] = {"target_epsilon": target_epsilon, "delta": delta}
    budget |= {"accountant": accountant, "adjacency": adjacency}
    banded = compare_bands(sample_rate=sample_rate, steps=steps, every=False, **budget)
    found = {"gaussian": banded[0], "banded": best_bands(banded)}
    if Adjacency.of(adjacency) is not Adjacency.ADD_REMOVE:
        apart = max(1, round(1 / sample_rate))
        u = best_inverse(steps, apart)
        noise = accounting.noise_multiplier_for(
            lambda value: SeparatedGaussian(value, u, apart, steps), **budget
        )
        error = noise * workload_error(u, steps, inverse=True)
        found["inverse-banded"] = BandChoice(len(u), noise, error, u)
        buffers = best_buffers(steps, apart)
        numbers = buffers.coefficients
        noise = accounting.noise_multiplier_for(
            lambda value: BufferedGaussian(value, numbers, apart, steps), **budget
        )
        # The noise multiplier holds the sensitivity already.
        error = noise * workload_error(buffers.inverse(steps), steps, inverse=True)
        count = len(buffers.scales)
        found["buffered-toeplitz"] = BandChoice(count, noise, error, numbers)
    return found
