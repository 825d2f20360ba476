"""The law of the noise, held against what an observer of every step of the white-box game sees.

What is left of a canary's coordinate without what the canary did is noise: N(0, σ²), independent over
steps and coordinates (of correlated noise: once it is white again). Pooled, noise that is missing in
one step of twenty hardly changes the spread. By itself, that step shows it at once.

Each test looks one way: less noise than is claimed. More of it is no loss of privacy.
"""

from __future__ import annotations

import numpy as np

from dptorch.audit.evidence import Array
from dptorch.audit.laws.law_test import LawTest

__all__ = ["NOISE_LAWS", "noise_between_runs", "noise_within_run"]

# So many tests `noise_within_run` makes, and one more `noise_between_runs`.
NOISE_LAWS = 5
# Noise smaller than this share of σ counts as none; what float32 leaves of none is far below.
_NONE = 1e-4
# Steps that are compared pair by pair; more take more time than they are worth.
_MOST_STEPS = 2000


def noise_within_run(
    noise: Array, sigma: float, *, significance: float, continuous: bool = True
) -> list[LawTest]:
    """Hold the noise of one run against N(0, σ²), independent in each step and coordinate.

    Four tests: the sum of squares over σ² of each step, and of each coordinate, is chi-square; the
    number of cells with hardly any noise is binomial; the correlation of two steps is that of
    independent normal vectors (the first 2000 steps are compared). Within each, the p-value is
    multiplied by the number of comparisons (Bonferroni).

    Args:
        noise: [steps, coordinates], in the unit of sigma.
        significance: of each test.
        continuous: whether the noise is normal; integer noise is exactly 0 now and then.

    Example:
        >>> noise = np.random.default_rng(0).normal(size=(20, 500))
        >>> [t.broken for t in noise_within_run(noise, 1.0, significance=1e-3)]
        [False, False, False, False]
        >>> noise[7] = 0.0
        >>> noise_within_run(noise, 1.0, significance=1e-3)[0].broken
        True
    """
    tests = [
        _spread(noise, sigma, 1, "noise of each step", "step", significance),
        _spread(noise, sigma, 0, "noise of each coordinate", "coordinate", significance),
    ]
    if continuous:
        tests.append(_missing(noise, sigma, significance))
    if len(noise) > 1:
        kept = noise[:_MOST_STEPS]
        matrix = np.triu(_correlations(kept, kept), 1)
        pairs = len(kept) * (len(kept) - 1) // 2
        tests.append(
            _repeat(matrix, pairs, noise.shape[1], "noise of two steps", "steps", significance)
        )
    return tests


def noise_between_runs(noise: Array, other: Array, *, significance: float) -> LawTest:
    """Hold the first step's noise of another run on the same data against every step of this one.

    Args:
        noise: [steps, coordinates].
        other: [1, coordinates].
    """
    matrix = _correlations(noise, other)
    law = "noise of two runs"
    return _repeat(
        matrix, len(noise), noise.shape[1], law, "step and the other run's", significance
    )


def _spread(
    noise: Array, sigma: float, axis: int, law: str, what: str, significance: float
) -> LawTest:
    from scipy.stats import chi2

    squares = np.square(noise / sigma).sum(axis=axis)
    worst = int(squares.argmin())
    p_value = min(1.0, len(squares) * float(chi2.cdf(squares[worst], noise.shape[axis])))
    found = sigma * np.sqrt(squares[worst] / noise.shape[axis])
    return LawTest(
        law,
        p_value,
        significance,
        f"{what} {worst} has noise of standard deviation {found:.3g} where {sigma:.3g} is claimed",
    )


def _missing(noise: Array, sigma: float, significance: float) -> LawTest:
    from scipy.stats import binom, norm

    chance = 2 * float(norm.cdf(_NONE)) - 1
    count = int((np.abs(noise) <= _NONE * sigma).sum())
    return LawTest(
        "noise in every cell",
        float(binom.sf(count - 1, noise.size, chance)),
        significance,
        f"{count} of {noise.size} numbers (steps times coordinates) have hardly any noise, where "
        f"{noise.size * chance:.1f} are expected",
    )


def _correlations(one: Array, other: Array) -> Array:
    """Cosines of the angles between rows; 0 where a row is 0, which another test reports."""
    lengths = [np.linalg.norm(m, axis=1, keepdims=True) for m in (one, other)]
    a, b = (
        np.divide(m, n, out=np.zeros_like(m), where=n > 0)
        for m, n in zip((one, other), lengths, strict=True)
    )
    cosines: Array = a @ b.T
    return cosines


def _repeat(
    cosines: Array, pairs: int, size: int, law: str, what: str, significance: float
) -> LawTest:
    from scipy.stats import t as student

    i, j = np.unravel_index(int(np.abs(cosines).argmax()), cosines.shape)
    worst = float(np.clip(cosines[i, j], -1, 1))
    # Exact for independent normal vectors about 0: they have `size` degrees of freedom, less one.
    scaled = abs(worst) * np.sqrt((size - 1) / max(1 - worst * worst, 1e-300))
    p_value = min(1.0, 2 * pairs * float(student.sf(scaled, size - 1)))
    return LawTest(
        law, p_value, significance, f"{what} {i} and {j} have noise of correlation {worst:.3f}"
    )
