"""The ε of a plan, composed apart from the accountants that state it.

An accountant that states too little would otherwise be judged by itself: it also composes what single
steps show. Nothing of `dptorch.accounting` is used here.
"""

from __future__ import annotations

import math

import numpy as np

from dptorch.audit.laws.law_test import LawTest
from dptorch.plan import PrivacyPlan

__all__ = ["claim_against_composition", "least_epsilon"]

_POINTS = 2**18
_CELLS = 2**20
# What the Fourier transform rounds is of this order; a smaller δ drowns in it.
_LEAST_DELTA = 1e-11


def claim_against_composition(plan: PrivacyPlan) -> LawTest | None:
    """Hold a plan's ε against one composed here; None where this file cannot compose the plan.

    It composes independent Gaussian noise on Poisson samples, the whole of the data among them.
    """
    covered = plan.mechanism == "gaussian" and plan.sampling == "poisson"
    if not covered or plan.noise_multiplier < 0.1 or plan.target_delta < _LEAST_DELTA:
        return None
    claimed = plan.epsilon()
    least = least_epsilon(
        plan.noise_multiplier / plan.adjacency.sensitivity_factor
        if plan.sample_rate == 1
        else plan.noise_multiplier,
        plan.sample_rate,
        plan.steps,
        plan.target_delta,
        replaced=plan.adjacency.sensitivity_factor > 1,
    )
    return LawTest(
        "claimed epsilon, composed apart",
        float(claimed >= 0.999 * least),
        0.0,
        f"the plan's noise, rate and steps cost at least {least:.4g}, where {claimed:.4g} is claimed",
    )


def least_epsilon(
    sigma: float, rate: float, steps: int, delta: float, *, replaced: bool = False
) -> float:
    """A lower bound on the ε of so many steps of Gaussian noise on Poisson samples; near the true one.

    Without sampling: the closed form of the Gaussian mechanism (Balle and Wang 2018). With it, the
    privacy loss log P/Q of one step is put on a grid, always rounded down, and convolved with itself by
    a Fourier transform. P = (1-q) N(0, σ²) + q N(1, σ²); Q = N(0, σ²), or, where a record is replaced,
    (1-q) N(0, σ²) + q N(-1, σ²). Two records' data sets give exactly these, so what they show is real.

    Example:
        >>> round(least_epsilon(10.0, 1.0, 100, 1e-5), 3)
        4.377
        >>> round(least_epsilon(1.0, 0.01, 1000, 1e-5), 1)
        1.8
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr, ndtr

    if rate == 1:
        mu = math.sqrt(steps) / sigma

        def log_delta(epsilon: float) -> float:
            high, low = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
            return float(high + np.log(-np.expm1(min(low - high, -1e-300))))

        top = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1.0
        target = math.log(delta)
        return (
            0.0
            if log_delta(0.0) <= target
            else float(brentq(lambda e: log_delta(e) - target, 0.0, top))
        )
    x = np.linspace(-12 * sigma - 1, 12 * sigma + 1, _POINTS)
    out, hit = (np.abs(np.diff(ndtr(-(x - shift) / sigma))) for shift in (0.0, 1.0))
    mass = (1 - rate) * out + rate * hit

    def log_mixture(shift: float) -> np.ndarray:
        return np.logaddexp(
            math.log1p(-rate), math.log(rate) + (2 * shift * x[:-1] - 1) / (2 * sigma**2)
        )

    # It rises with x: the left end of a cell has its smallest loss.
    loss = log_mixture(1.0) - (log_mixture(-1.0) if replaced else 0.0)
    mean = float(mass @ loss)
    deviation = math.sqrt(max(float(mass @ (loss - mean) ** 2), 1e-300))
    width = 2 * (14 * deviation * math.sqrt(steps) + float(np.abs(loss[mass > 1e-15]).max()))
    grid = width / _CELLS
    # Measured from the mean's cell; each step's rounding goes down by half a cell on average.
    centre = math.floor(mean / grid)
    cells = np.floor(loss / grid).astype(np.int64) - centre
    inside = np.abs(cells) < _CELLS // 2
    one = np.bincount(cells[inside] % _CELLS, weights=mass[inside], minlength=_CELLS)
    composed = np.fft.irfft(np.fft.rfft(one) ** steps, _CELLS)
    position = np.fft.fftfreq(_CELLS, 1 / _CELLS)
    total = grid * (steps * centre + position)
    # 14 deviations and the largest loss of a step away, nothing is left to come round the other end.
    kept = composed > 1e-17
    total, composed = total[kept], composed[kept]

    def excess(epsilon: float) -> float:
        above = total > epsilon
        return float(composed[above] @ -np.expm1(epsilon - total[above])) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, float(total.max()), xtol=1e-6))
