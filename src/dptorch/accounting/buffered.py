"""Buffered Toeplitz strategies: noise correlated over all steps of a long run, by a few buffers.

C is Toeplitz with c_0 = 1 and a sum of d geometric sequences after it, and so is its inverse:

    c_k = Σ ω_i θ_i^(k-1)        u_k = -Σ ω̂_i θ̂_i^(k-1)        for k >= 1

so that d numbers for each coordinate are all that a step has to know of the steps before it, however
many they are (Dvijotham, McMahan, Pillutla, Steinke, Thakurta 2024, arXiv:2404.16706; several
participations: McMahan, Xu, Zhang 2024, arXiv:2408.08868). θ̂ are the eigenvalues of diag(θ) - vv',
where v_i is the root of ω_i, and ω̂_i the squared products of v with its eigenvectors: the update of the
buffers by the inverse, made symmetric. Sensitivity and error are sums of geometric series, which are
computed in closed form and in 1 - θ, which is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dptorch.accounting.arguments import number, positive_int
from dptorch.accounting.toeplitz import toeplitz_sensitivity
from dptorch.errors import ConfigurationError

__all__ = ["MOST_BUFFERS", "Buffers", "best_buffers", "buffered_error", "optimised_buffers"]

Numbers = NDArray[np.float64]

#: Buffers that are tried; more gain nothing below some 10^7 steps.
MOST_BUFFERS: Final = 5
# One more buffer must gain so much.
_WORTH: Final = 0.02
# Significant digits of what is found, so that machines agree about it.
_DIGITS: Final = 5
_STENCIL: Final = 1e-3


@dataclass(frozen=True)
class Buffers:
    """A buffered Toeplitz strategy.

    Attributes:
        scales: ω > 0, at most 1 together, so that c does not increase; [d].
        decays: θ in [0, 1), [d].

    Raises:
        ConfigurationError: they are not; `toeplitz_sensitivity` would not cover them.

    Example:
        >>> Buffers((0.5,), (0.5,)).strategy(4), Buffers((0.5,), (0.5,)).inverse(4)
        (array([1.   , 0.5  , 0.25 , 0.125]), array([ 1. , -0.5,  0. ,  0. ]))
    """

    scales: tuple[float, ...]
    decays: tuple[float, ...]

    def __post_init__(self) -> None:
        scales = tuple(number("scales", value) for value in self.scales)
        decays = tuple(number("decays", value) for value in self.decays)
        object.__setattr__(self, "scales", scales)
        object.__setattr__(self, "decays", decays)
        if len(scales) != len(decays) or not all(value > 0 for value in scales):
            raise ConfigurationError(
                f"scales={scales} and decays={decays} must be as many, and scales above 0."
            )
        if not all(0 <= value < 1 for value in decays) or not sum(scales) <= 1:
            raise ConfigurationError(
                f"scales={scales}, decays={decays}: decays must be in [0, 1), and scales at most 1 "
                "together. No theorem here covers a C whose coefficients increase."
            )

    @classmethod
    def of(cls, coefficients: tuple[float, ...]) -> Buffers:
        """The strategy that a plan holds as one row of numbers: first all ω, then all θ.

        Raises:
            ConfigurationError: they are no strategy.
        """
        count = len(coefficients) // 2
        return cls(tuple(coefficients[:count]), tuple(coefficients[count:]))

    @property
    def coefficients(self) -> tuple[float, ...]:
        """What `of` takes."""
        return (*self.scales, *self.decays)

    def strategy(self, steps: int) -> Numbers:
        """The first `steps` coefficients of C."""
        return _series(np.array(self.scales), np.array(self.decays), steps)

    def inverse(self, steps: int) -> Numbers:
        """The first `steps` coefficients of its inverse."""
        gaps, weights = _inverse(np.log(1 - np.array(self.decays)), np.log(np.array(self.scales)))
        return _series(-weights, 1 - gaps, steps)


def buffered_error(buffers: Buffers, steps: int, separation: int, *, worst: bool = False) -> float:
    """Noise of the prefix sums times the sensitivity of C, as `toeplitz.inverse_error`.

    Args:
        buffers: the strategy.
        steps: n of the run.
        separation: steps from one participation of a record to its next; from `steps` on it has one.
        worst: of the last sum, which has most noise, instead of the root mean square over steps.

    Example:
        >>> round(buffered_error(Buffers((0.45, 0.04), (0.6, 0.98)), 2048, 256), 2)
        27.25
    """
    gaps, scales = 1 - np.array([buffers.decays]), np.array([buffers.scales])
    return float(np.exp(_log_error(np.log(gaps), np.log(scales), steps, separation, worst)[0] / 2))


def optimised_buffers(count: int, steps: int, separation: int, *, worst: bool = False) -> Buffers:
    """The strategy of `count` buffers with the least `buffered_error`.

    Found by L-BFGS in log ω and log (1 - θ), from the quadrature of c_k ≈ 1 / √(πk), the square root of
    the prefix sum, as a sum of geometric sequences.

    Example:
        >>> round(buffered_error(optimised_buffers(2, 1000, 1000), 1000, 1000), 3)
        3.076
    """
    from scipy.optimize import minimize

    positive_int("count", count)
    edges = np.linspace(math.log(0.5 / steps), math.log(0.9), count + 1)
    gaps = (edges[1:] + edges[:-1]) / 2
    begin = np.concatenate([gaps, gaps / 2 + math.log((edges[1] - edges[0]) / math.pi)])

    def logs(points: Numbers) -> Numbers:
        gaps, scales = points[:, :count], points[:, count:]
        found = _log_error(gaps, scales, steps, separation, worst)
        too_large = np.exp(scales).sum(axis=1) > 1
        return np.where(too_large | ~np.isfinite(found), 1e3, found)

    moves = np.concatenate([h * np.eye(2 * count) for h in (-2.0, -1.0, 1.0, 2.0)]) * _STENCIL

    def loss(point: Numbers) -> tuple[float, Numbers]:
        found = logs(np.concatenate([[point], point + moves]))
        a, b, c, d = found[1:].reshape(4, 2 * count)
        return float(found[0]), (a - 8 * b + 8 * c - d) / (12 * _STENCIL)

    bounds = [(math.log(1e-3 / steps), math.log(0.999))] * count + [(-40.0, -0.01)] * count
    options = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-9}
    found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    order = np.argsort(found.x[:count])
    gaps, scales = np.exp(found.x[:count][order]), np.exp(found.x[count:][order])
    return Buffers(tuple(scales.tolist()), tuple((1 - gaps).tolist()))


def best_buffers(steps: int, separation: int, count: int | None = None) -> Buffers:
    """The fewest buffers that gain: one more would lower the error by less than 2 %.

    Args:
        steps: of the run.
        separation: steps from one participation of a record to its next.
        count: how many, instead.

    Example:
        >>> len(best_buffers(20, 20).scales), len(best_buffers(20, 20, 2).scales)
        (1, 2)
    """
    if count is not None:
        return _rounded(optimised_buffers(count, steps, separation))
    best = optimised_buffers(1, steps, separation)
    for more in range(2, MOST_BUFFERS + 1):
        found = optimised_buffers(more, steps, separation)
        errors = [buffered_error(b, steps, separation) for b in (best, found)]
        if errors[1] > errors[0] * (1 - _WORTH):
            break
        best = found
    return _rounded(best)


def sensitivity_of(buffers: Buffers, steps: int, separation: int) -> float:
    """That of C to a record in steps `separation` apart, from the numbers of its first column."""
    return toeplitz_sensitivity(
        buffers.strategy(steps), steps=steps, participations=steps, min_separation=separation
    )


def _rounded(buffers: Buffers) -> Buffers:
    """θ by the digits of 1 - θ."""
    digits = f"%.{_DIGITS - 1}e"
    return Buffers(
        tuple(float(digits % value) for value in buffers.scales),
        tuple(1 - float(digits % (1 - value)) for value in buffers.decays),
    )


# -- closed forms ----------------------------------------------------------------------------------
#
# Each takes many strategies at once, [m, d], so that a gradient is one call.


def _log_error(
    log_gaps: Numbers, log_scales: Numbers, steps: int, separation: int, worst: bool
) -> Numbers:
    """The log of squared sensitivity times squared error, [m]."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        sensitivity = _squared_sensitivity(np.exp(log_gaps), np.exp(log_scales), steps, separation)
        return np.asarray(
            np.log(sensitivity) + np.log(_squared_error(log_gaps, log_scales, steps, worst))
        )


def _squared_sensitivity(gaps: Numbers, scales: Numbers, steps: int, separation: int) -> Numbers:
    """‖c shifted by 0, b, 2b, ... added up‖²: a block of b steps after the other, [m]."""
    separation = min(separation, steps)
    blocks = np.arange(-(-steps // separation))
    sizes = np.minimum(separation, steps - blocks * separation)
    period = -np.expm1(_log_power(gaps, separation))[..., None]  # 1 - θ^b
    begun = _geometric(
        period, blocks + 1
    )  # of each buffer, over the participations so far: [m, d, k]
    last = np.exp(_log_power(gaps, separation - 1))[..., None] * _geometric(period, blocks)
    first = 1 + (scales[..., None] * last).sum(axis=1)
    weighed = scales[..., None] * begun
    series = _geometric(_product_gaps(gaps)[..., None], sizes - 1)
    rest = np.einsum("mik,mjk,mijk->mk", weighed, weighed, series)
    return np.asarray((first**2 + rest).sum(axis=1))


def _squared_error(log_gaps: Numbers, log_scales: Numbers, steps: int, worst: bool) -> Numbers:
    """Of the last prefix sum of u, or the mean over all of them, [m]."""
    gaps, weights = _inverse(log_gaps, log_scales)
    # The prefix sum of u up to k is limit + Σ shares θ̂^k.
    limit = 1 / (1 + np.exp(log_scales - log_gaps).sum(axis=-1, keepdims=True))
    shares = np.concatenate([limit, weights / gaps], axis=-1)
    gaps = np.concatenate([np.zeros_like(limit), gaps], axis=-1)
    sums = _geometric if worst else _mean_of_geometric
    series = sums(_product_gaps(gaps), np.array(steps))
    return np.asarray(np.einsum("mi,mj,mij->m", shares, shares, series))


def _inverse(log_gaps: Numbers, log_scales: Numbers) -> tuple[Numbers, Numbers]:
    """1 - θ̂ and ω̂ of the inverse, [..., d]."""
    roots = np.exp(log_scales / 2)
    square = roots[..., :, None] * roots[..., None, :]
    square = square + np.exp(log_gaps)[..., None] * np.eye(square.shape[-1])
    values, vectors = np.linalg.eigh(square)
    return values, np.einsum("...i,...ij->...j", roots, vectors) ** 2


def _product_gaps(gaps: Numbers) -> Numbers:
    """1 - θ_i θ_j."""
    a, b = gaps[..., :, None], gaps[..., None, :]
    return np.asarray(a + b - a * b)


def _log_power(gaps: Numbers, exponent: Any) -> Numbers:
    return np.asarray(exponent * np.log1p(-np.minimum(gaps, 1 - 1e-15)))  # 0 times a number


def _one_minus_power(gaps: Numbers, exponents: Any) -> Numbers:
    """1 - x^n of x = 1 - gap, which may be negative."""
    small = -np.expm1(exponents * np.log1p(-np.minimum(gaps, 0.5)))
    return np.where(gaps < 0.5, small, 1 - np.power(1 - gaps, np.asarray(exponents, np.int64)))


def _geometric(gaps: Numbers, counts: Any) -> Numbers:
    """1 + x + ... + x^(n - 1)."""
    safe = np.where(gaps == 0, 1.0, gaps)
    return np.where(gaps == 0, counts, _one_minus_power(gaps, counts) / safe)


def _mean_of_geometric(gaps: Numbers, counts: Any) -> Numbers:
    """The mean over m = 1, ..., n of 1 + x + ... + x^(m - 1)."""
    n = np.asarray(counts, np.float64)
    near = n * gaps < 1e-4
    safe = np.where(near, 1.0, gaps)
    far = (1 - (1 - gaps) * _geometric(gaps, counts) / n) / safe
    series = (n + 1) / 2 * (1 - gaps * (n - 1) / 3 * (1 - gaps * (n - 2) / 4))
    return np.where(near, series, far)


def _series(scales: Numbers, decays: Numbers, steps: int) -> Numbers:
    """1 and the sum of geometric sequences after it."""
    powers = np.arange(steps - 1)
    return np.concatenate([[1.0], scales @ decays[:, None] ** powers])[:steps]
