"""Noise that is correlated over steps by a Toeplitz matrix: coefficients, sensitivity, error.

A run of n steps releases x + C⁻¹z: x are the clipped sums of its steps, z is white noise, C is lower
triangular with ones on its diagonal. Here C is Toeplitz, so one sequence says all of it:

    C[t, s]   = c[t - s]     the *strategy*; its columns decide what the noise has to hide
    C⁻¹[t, s] = u[t - s]     the power series of 1 / c: how the noise of a step is made of z

A *banded* strategy has c[i] = 0 from i = b on, an *inverse-banded* one u[i] = 0 from i = p on. What
training feels is not the noise of single steps but that of the parameters, which are sums over steps:
A C⁻¹z for a *workload* A. C is chosen so that A C⁻¹ is small for what its columns cost.

Square roots of the prefix sum: Fichtenberger, Henzinger, Upadhyay 2023 (arXiv:2202.11205); cut to b
bands: Kalinin and Lampert 2024 (arXiv:2405.13763); optimised bands: McKenna 2024 (arXiv:2405.15913);
cut inverses: Kalinin et al. 2025 (arXiv:2505.12128).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dptorch.accounting.arguments import number, positive_int
from dptorch.errors import ConfigurationError

__all__ = [
    "Coefficients",
    "Workload",
    "coefficients_of",
    "column_norms",
    "inverse",
    "inverse_coefficients_of",
    "inverse_error",
    "inverse_square_root",
    "optimised",
    "square_root",
    "toeplitz_sensitivity",
    "unbounded_sensitivity",
    "workload_error",
]

Numbers: TypeAlias = NDArray[np.float64]

# A matrix of all steps by this many of its columns stands for the whole, where rates change.
_COLUMNS = 256
# Coefficients are optimised for no more steps than this, which is past what they depend on, and rounded
# to so many digits, so that machines agree about them.
_HORIZON, _DIGITS = 4096, 6


@dataclass(frozen=True)
class Workload:
    """What is wanted of a run's noisy gradients: the parameters after each step of SGD.

    Attributes:
        momentum: β of ``v = β v + g``, in [0, 1). (Polyak's; without dampening.)
        rates: learning rate of each step, over any common factor; empty for a constant rate.

    Example:
        >>> Workload().matrix(3)  # constant rate, no momentum: the prefix sum
        array([[1., 0., 0.],
               [1., 1., 0.],
               [1., 1., 1.]])
        >>> Workload(momentum=0.5, rates=(1.0, 0.1)).matrix(2).round(3)
        array([[1.  , 0.  ],
               [1.05, 0.1 ]])
    """

    momentum: float = 0.0
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        momentum = number("momentum", self.momentum)
        if not 0 <= momentum < 1:
            raise ConfigurationError(f"momentum={self.momentum!r} must be in [0, 1).")
        rates = tuple(number("rates", rate) for rate in self.rates)
        if not all(0 <= rate < math.inf for rate in rates) or (rates and not any(rates)):
            raise ConfigurationError("rates must be finite numbers >= 0, and not all of them 0.")
        object.__setattr__(self, "momentum", momentum)
        object.__setattr__(self, "rates", rates)

    def rates_of(self, steps: int) -> Numbers:
        """The learning rate of each of `steps` steps.

        Raises:
            ConfigurationError: there are rates, but not that many.
        """
        if self.rates and len(self.rates) != steps:
            raise ConfigurationError(
                f"the workload has {len(self.rates)} learning rates, and the run {steps} steps. Give "
                "one for each step, or none for a constant rate."
            )
        return np.array(self.rates) if self.rates else np.ones(steps)

    def matrix(self, steps: int) -> Numbers:
        """A, [steps, steps]: for small examples and tests."""
        powers = self.momentum ** np.arange(steps)
        steered = _dense(powers, steps) * self.rates_of(steps)[:, None]
        return np.asarray(np.cumsum(steered, axis=0), np.float64)


#: How coefficients are asked for: by name, by the workload they are optimised for, or as numbers.
Coefficients: TypeAlias = str | Workload | Sequence[float]


# -- coefficients ----------------------------------------------------------------------------------


def square_root(bands: int) -> Numbers:
    """The first coefficients c of the matrix whose square is the prefix sum.

    Example:
        >>> square_root(4)
        array([1.    , 0.5   , 0.375 , 0.3125])
    """
    i = np.arange(1, positive_int("bands", bands))
    return np.concatenate([[1.0], np.cumprod((2 * i - 1) / (2 * i))])


def inverse_square_root(bands: int) -> Numbers:
    """The first coefficients u of its inverse.

    Example:
        >>> inverse_square_root(4)
        array([ 1.    , -0.5   , -0.125 , -0.0625])
    """
    i = np.arange(1, positive_int("bands", bands))
    return np.concatenate([[1.0], np.cumprod((2 * i - 3) / (2 * i))])


def inverse(coefficients: ArrayLike, steps: int) -> Numbers:
    """The first `steps` coefficients of the inverse.

    Example:
        >>> inverse([1.0, -0.5], 4)
        array([1.   , 0.5  , 0.25 , 0.125])
    """
    impulse = np.zeros(steps)
    impulse[0] = 1.0
    return _filtered([1.0], coefficients, impulse)


def inverse_coefficients_of(
    bands: int, steps: int, wanted: str | Sequence[float], *, separation: int
) -> Numbers:
    """The coefficients u of an inverse-banded strategy.

    Args:
        bands: how many, at most. Two are 1, -λ with the best λ (λ-CGD; arXiv:2601.22334), more those of
            the square root's inverse.
        steps: of the run.
        wanted: "square-root", or the coefficients themselves.
        separation: fewest steps from one participation of a record to its next.

    Raises:
        ConfigurationError: they are neither, more than `bands`, or of a C that is not covered.
    """
    bands = min(positive_int("bands", bands), positive_int("steps", steps))
    if not isinstance(wanted, str):
        u = _checked(wanted)
        if len(u) > bands:
            raise ConfigurationError(f"{len(u)} coefficients are given for bands={bands}.")
    elif wanted != "square-root":
        raise ConfigurationError(
            f"coefficients={wanted!r} must be 'square-root' for mechanism='inverse-banded', or the "
            "numbers themselves."
        )
    elif bands == 2:
        from scipy.optimize import minimize_scalar

        found = minimize_scalar(
            lambda x: inverse_error([1.0, -x], steps, separation), bounds=(0, 1), method="bounded"
        )
        u = np.array([1.0, -round(float(found.x), _DIGITS)])
    else:
        u = inverse_square_root(bands)
    if (u[1:] > 0).any():
        raise ConfigurationError(
            "coefficients of C⁻¹ after the first must be at most 0: later steps take noise back."
        )
    inverse_error(u, steps, separation)  # refuses what is not covered
    return u


def inverse_error(coefficients: ArrayLike, steps: int, separation: int) -> float:
    """`workload_error` of an inverse-banded strategy with sensitivity 1, for the prefix sum.

    Example:
        >>> round(inverse_error(inverse_square_root(16), 2048, separation=256), 3)
        19.707
    """
    sensitivity = toeplitz_sensitivity(
        inverse(coefficients, steps), steps=steps, participations=steps, min_separation=separation
    )
    return sensitivity * workload_error(coefficients, steps, inverse=True)


def coefficients_of(bands: int, steps: int, wanted: Coefficients) -> Numbers:
    """The coefficients c of a banded strategy.

    Args:
        bands: how many, at most.
        steps: of the run.
        wanted: "square-root"; "prefix-sum" or a `Workload`, for which they are optimised; or the
            coefficients themselves, over the first of which they are returned.

    Raises:
        ConfigurationError: they are none of these, or more than `bands`.
    """
    bands = min(positive_int("bands", bands), positive_int("steps", steps))
    if isinstance(wanted, str) and wanted == "square-root":
        return square_root(bands)
    if isinstance(wanted, str) and wanted == "prefix-sum":
        wanted = Workload()
    if isinstance(wanted, Workload):
        horizon = steps if wanted.rates else min(steps, _HORIZON)
        return optimised(bands, horizon, wanted).round(_DIGITS)
    if isinstance(wanted, str):
        raise ConfigurationError(
            f"coefficients={wanted!r} must be 'square-root', 'prefix-sum', a "
            "dptorch.accounting.Workload, or the numbers themselves."
        )
    given = _checked(wanted)
    if len(given) > bands:
        raise ConfigurationError(
            f"{len(given)} coefficients are given for bands={bands}: a record that takes part every "
            f"{bands} steps would overlap with itself. Give at most {bands}."
        )
    return given


def optimised(bands: int, steps: int, workload: Workload) -> Numbers:
    """The banded coefficients with the least `workload_error` over the norm of a full column.

    Found by L-BFGS from the square root's, with exact gradients.

    Example:
        >>> c, plain = optimised(4, 64, Workload()), square_root(4)
        >>> better, usual = (float(np.linalg.norm(x)) * workload_error(x, 64) for x in (c, plain))
        >>> 0.9 * usual < better < usual
        True
    """
    if bands == 1:
        return np.ones(1)
    from scipy.optimize import minimize

    problem = _Problem(steps, workload)

    def loss(tail: Numbers) -> tuple[float, Numbers]:
        c = np.concatenate([[1.0], tail])
        value, slope = problem.squared_error(c)
        if not math.isfinite(value):  # a step of the search to where 1 / c grows without end
            return 1e3, np.zeros(len(tail))
        size = float(c @ c)
        return math.log(value) + math.log(size), (slope / value + 2 * c / size)[1:]

    begin = square_root(bands)[1:]
    with np.errstate(over="ignore", invalid="ignore"):
        found = minimize(loss, begin, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return np.concatenate([[1.0], found.x if found.fun < loss(begin)[0] else begin])


# -- sensitivity -----------------------------------------------------------------------------------


def column_norms(coefficients: ArrayLike, steps: int) -> Numbers:
    """The norm of each column of C, [steps]: the last columns are cut off by the end of the run.

    Example:
        >>> column_norms([1.0, 1.0], 3).round(3)
        array([1.414, 1.414, 1.   ])
    """
    c = _checked(coefficients)[:steps]
    squares = np.concatenate([np.cumsum(c**2), np.full(steps - len(c), float(c @ c))])
    return np.sqrt(squares[::-1])


def toeplitz_sensitivity(
    coefficients: ArrayLike, *, steps: int, participations: int, min_separation: int
) -> float:
    """The sensitivity of C x to one record, in units of the clipping bound.

    Args:
        coefficients: c; what is missing up to `steps` is 0.
        steps: n of the run.
        participations: most steps that a record takes part in.
        min_separation: fewest steps from one of them to the next.

    Returns:
        The exact value, for steps 0, b, 2b, ...: where C has at most `min_separation` bands the root
        of a sum of squared column norms (Choquette-Choo et al. 2023, arXiv:2306.08153, Theorem 2);
        where c is positive and does not increase, the norm of a sum of columns (Kalinin and Lampert
        2024, arXiv:2405.13763, Theorem 2).

    Raises:
        ConfigurationError: c is neither; `strategy_sensitivity` bounds any C.

    Example:
        >>> toeplitz_sensitivity([1.0, 0.5], steps=4, participations=2, min_separation=2)
        1.5811388300841898
    """
    c = _checked(coefficients)[:steps]
    positive_int("participations", participations)
    positive_int("min_separation", min_separation)
    starts = range(0, steps, min_separation)[:participations]
    if len(c) <= min_separation:
        return math.sqrt(sum(float(c[: steps - at] @ c[: steps - at]) for at in starts))
    if (c < 0).any() or (np.diff(c) > 1e-12).any():
        raise ConfigurationError(
            "coefficients that reach beyond min_separation must be positive and not increase. Use "
            "strategy_sensitivity, which bounds the sensitivity of any matrix."
        )
    total = np.zeros(steps)
    for at in starts:
        part = c[: steps - at]
        total[at : at + len(part)] += part
    return float(np.linalg.norm(total))


def unbounded_sensitivity(coefficients: ArrayLike, steps: int) -> float:
    """A bound on the sensitivity of C with columns of norm 1, if a record may be in every step.

    The norm of the sum of all columns, by absolute values: what a record's contributions, of norm at
    most 1 each, add up to.
    """
    c = np.abs(_checked(coefficients))
    return float(np.linalg.norm(_filtered(c, [1.0], 1 / column_norms(c, steps))))


# -- error -----------------------------------------------------------------------------------------


def workload_error(
    coefficients: ArrayLike, steps: int, workload: Workload | None = None, *, inverse: bool = False
) -> float:
    """The root mean square, over steps and coordinates, of A C⁻¹z for z of variance 1.

    Times a sensitivity and a noise multiplier it is the noise of the parameters, over the clipping
    bound and the learning rate.

    Args:
        coefficients: c, or with `inverse` u.
        steps: n of the run.
        workload: A; by default the prefix sum.
        inverse: whether the coefficients are those of C⁻¹.

    Example:
        >>> round(workload_error([1.0], 128), 4), round(workload_error(square_root(128), 128), 4)
        (8.0312, 1.5158)
    """
    c = _checked(coefficients)
    above, below = (c, [1.0]) if inverse else ([1.0], c)
    problem = _Problem(steps, Workload() if workload is None else workload)
    return math.sqrt(problem.mean_square(problem.series(above, below)))


class _Problem:
    """The mean square of A C⁻¹z, and its slope in c."""

    def __init__(self, steps: int, workload: Workload) -> None:
        self._steps = steps
        self._momentum = workload.momentum
        self._rates = None if not workload.rates else workload.rates_of(steps)
        every = -(-steps // _COLUMNS)
        self._columns = range(0, steps, every)

    def series(self, above: ArrayLike, below: ArrayLike) -> Numbers:
        """The coefficients of M C⁻¹, where M is momentum, and the prefix sum too if it is constant."""
        impulse = np.zeros(self._steps)
        impulse[0] = 1.0
        smoothed = _filtered([1.0], [1.0, -self._momentum], _filtered(above, below, impulse))
        return np.cumsum(smoothed) if self._rates is None else smoothed

    def mean_square(self, series: Numbers) -> float:
        return self._mean_square(series)[0]

    def squared_error(self, c: Numbers) -> tuple[float, Numbers]:
        series = self.series([1.0], c)
        value, slope = self._mean_square(series)
        # d series / d c_j is minus the series divided by c once more, j places later.
        further = _filtered([1.0], c, series)
        found = [-float(slope[j:] @ further[: self._steps - j]) for j in range(len(c))]
        return value, np.array(found)

    def _mean_square(self, series: Numbers) -> tuple[float, Numbers]:
        n = self._steps
        if self._rates is None:
            weights = np.arange(n, 0, -1) / n
            return float(weights @ series**2), 2 * weights * series
        value, slope = 0.0, np.zeros(n)
        # Column s of A C⁻¹ is the running sum of rates[s:] * series. Some columns stand for all.
        share = 1 / len(self._columns)
        for s in self._columns:
            sums = np.cumsum(self._rates[s:] * series[: n - s])
            value += share * float(sums @ sums)
            back = np.cumsum(sums[::-1])[::-1]
            slope[: n - s] += 2 * share * self._rates[s:] * back
        return value, slope


def _filtered(above: ArrayLike, below: ArrayLike, values: ArrayLike) -> Numbers:
    from scipy.signal import lfilter

    found: Any = lfilter(np.atleast_1d(above), np.atleast_1d(below), values)
    return np.asarray(found, np.float64)


def _checked(coefficients: ArrayLike) -> Numbers:
    c = np.asarray(coefficients, np.float64)
    if c.ndim != 1 or not len(c) or not np.isfinite(c).all() or c[0] <= 0:
        raise ConfigurationError(
            f"coefficients={coefficients!r} must be finite numbers in a row, the first above 0."
        )
    return c / c[0]


def _dense(coefficients: ArrayLike, steps: int) -> Numbers:
    """The matrix of some coefficients, [steps, steps]."""
    found = np.zeros((steps, steps))
    for i, value in enumerate(np.atleast_1d(coefficients)[:steps]):
        found[np.arange(i, steps), np.arange(steps - i)] = value
    return found
