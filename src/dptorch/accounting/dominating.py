"""The worst-case pairs of output distributions that stand for a step, and their closed forms.

Every accountant here works on pairs (P, Q) of one-dimensional distributions whose hockey-stick
divergences H_α(P, Q) = ∫ (P - αQ)_+ bound those of the real outputs on any two neighbours, for
every α >= 0. Such *dominating pairs* compose (Zhu, Dong, Wang 2022, arXiv:2106.08567, Theorem 10),
each direction by itself (Lebeda et al. 2024, arXiv:2405.20769). In units of C = max_grad_norm, with
N(m) = N(m, σ²) and sampling rate q:

    remove    P = (1-q) N(0) + q N(1)    Q = N(0)                     (Zhu et al., Theorem 11)
    add       P = N(0)                   Q = (1-q) N(0) + q N(1)      (the same, reversed)
    replace   P = (1-q) N(0) + q N(1)    Q = (1-q) N(0) + q N(-1)     (its own reverse)

Why `replace` dominates: given the rest of the sample, the outputs are (1-q) N(0) + q N(u) and
(1-q) N(0) + q N(v) with |u|, |v| <= 1. For a set A with N(0)(A) = Φ(p), Neyman and Pearson give
N(u)(A) <= Φ(p + 1/σ) and N(v)(A) >= Φ(p - 1/σ), so H_α is at most
sup_p (1-q)(1-α) Φ(p) + q Φ(p + 1/σ) - αq Φ(p - 1/σ), which half-lines attain for u = 1, v = -1. The
randomness of the rest of the sample only lowers H_α, which is jointly convex. At q = 1 this is the
Gaussian mechanism with sensitivity 2C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.events import SampledGaussian

__all__ = [
    "Direction",
    "directions",
    "falling_root",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_mu",
    "largest_loss",
    "log_ratios",
    "one_step_delta",
    "thresholds",
]

Direction = Literal["remove", "add", "replace"]
Array = NDArray[Any]


def directions(adjacency: Adjacency) -> tuple[Direction, ...]:
    """The pairs to compose, each alone; the cost is the largest over them.

    Example:
        >>> directions(Adjacency.ADD_REMOVE), directions(Adjacency.REPLACE_ONE)
        (('remove', 'add'), ('replace',))
    """
    return ("replace",) if adjacency is Adjacency.REPLACE_ONE else ("remove", "add")


def log_ratios(x: Array, event: SampledGaussian, direction: Direction) -> tuple[Array, Array]:
    """Return log P(x)/N(0)(x) and log Q(x)/N(0)(x), float64 of x's shape.

    Example:
        >>> log_p, log_q = log_ratios(np.array([0.5]), SampledGaussian(1.0, 0.01, 1), "remove")
        >>> float(log_p[0]), float(log_q[0])
        (0.0, 0.0)
    """
    zero = np.zeros_like(x)
    up = _log_mixture((x - 0.5) / event.noise_multiplier**2, event.sample_rate)
    if direction == "remove":
        return up, zero
    if direction == "add":
        return zero, up
    return up, _log_mixture((-x - 0.5) / event.noise_multiplier**2, event.sample_rate)


def _log_mixture(exponent: Array, rate: float) -> Array:
    """log(1 - rate + rate e^exponent), exact to rounding also where the result is near 0."""
    if rate == 1:
        return exponent
    near = np.log1p(rate * np.expm1(np.minimum(exponent, 30.0)))
    far = np.logaddexp(math.log1p(-rate), math.log(rate) + exponent)
    return np.where(exponent < 30.0, near, far)


def largest_loss(events: Sequence[SampledGaussian], direction: Direction) -> float:
    """The supremum of the composed privacy loss: finite only where someone may be added."""
    if direction != "add" or any(event.sample_rate == 1 for event in events):
        return math.inf
    return -sum(event.steps * math.log1p(-event.sample_rate) for event in events)


def gaussian_mu(events: Sequence[SampledGaussian], direction: Direction) -> float:
    """μ of the Gaussian mechanism that `events` (all with sample_rate 1) compose to, exactly.

    Example:
        >>> gaussian_mu([SampledGaussian(10.0, 1.0, 100)], "remove")
        1.0
    """
    precision = math.fsum(event.steps / event.noise_multiplier**2 for event in events)
    return (2.0 if direction == "replace" else 1.0) * math.sqrt(precision)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ(ε) of N(μ, 1) against N(0, 1) (Balle and Wang 2018, arXiv:1805.06530, Theorem 8).

    Guarantees:
        Accurate to about 1e-13 relative, also where δ is far below 1e-16.

    Example:
        >>> round(gaussian_delta(1.0, 1.0), 6)
        0.126937
    """
    from scipy.special import log_ndtr

    if mu == 0:
        return 0.0
    upper = float(log_ndtr(mu / 2 - epsilon / mu))
    lower = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    # For a huge ε both tails underflow together; their difference is then 0 as well.
    return math.exp(upper) * -math.expm1(min(lower - upper, 0.0)) if upper > -745 else 0.0


def gaussian_epsilon(delta: float, mu: float) -> float:
    """The ε >= 0 at which `gaussian_delta(ε, mu)` is `delta`; 0 where it is below already.

    Example:
        >>> round(gaussian_epsilon(1e-5, 1.0), 7)
        4.3771781
    """
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    # N(0, 1) exceeds sqrt(2 log 1/δ) with probability below δ, so δ(high) < delta.
    high = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1e-9
    return falling_root(lambda epsilon: gaussian_delta(epsilon, mu), delta, high)


def one_step_delta(event: SampledGaussian, epsilon: float, direction: Direction) -> float:
    """δ(ε) of one step of `event`, in closed form, for ε >= 0.

    Amplification by sampling (Balle, Barthe, Gaboardi 2018, arXiv:1807.01647, Theorem 2) turns
    `remove` and `add` into the Gaussian's δ at another ε; `replace` is a half-line's two masses.

    Example:
        >>> round(one_step_delta(SampledGaussian(1.0, 0.01, 1), 0.1994504, "remove"), 9)
        1e-05
    """
    from scipy.special import ndtr

    q, sigma = event.sample_rate, event.noise_multiplier
    if direction == "remove":
        return q * gaussian_delta(_log_one_plus_ratio(epsilon, q), 1 / sigma)
    if direction == "add":
        if epsilon >= largest_loss([SampledGaussian(sigma, q, 1)], "add"):
            return 0.0
        weight = -math.expm1(epsilon + math.log1p(-q)) if q < 1 else 1.0
        inner = epsilon + math.log(q) - math.log(weight)
        return weight * gaussian_delta(max(inner, 0.0), 1 / sigma)
    start = float(thresholds(np.array([epsilon]), event, "replace")[0])
    outside = (1 - q) * ndtr(-start / sigma)
    p_mass = outside + q * ndtr((1 - start) / sigma)
    q_mass = outside + q * ndtr((-1 - start) / sigma)
    return max(0.0, float(p_mass - math.exp(min(epsilon, 700.0)) * q_mass))


def _log_one_plus_ratio(epsilon: float, q: float) -> float:
    """log(1 + (e^ε - 1) / q) without overflow."""
    if epsilon < 30:
        return math.log1p(math.expm1(epsilon) / q)
    return epsilon - math.log(q) + math.log1p(-(1 - q) * math.exp(-epsilon))


def thresholds(losses: Array, event: SampledGaussian, direction: Direction) -> Array:
    """The x at which the pair's privacy loss is `losses`; [n] to [n].

    The loss rises with x for `remove` and `replace` and falls for `add`. A loss below the smallest
    (above the largest, for `add`) gives -inf.

    Example:
        >>> step = SampledGaussian(noise_multiplier=2.0, sample_rate=0.25, steps=1)
        >>> x = np.array([-1.0, 0.5, 3.0])
        >>> for direction in ("remove", "add", "replace"):
        ...     log_p, log_q = log_ratios(x, step, direction)
        ...     assert np.allclose(thresholds(log_p - log_q, step, direction), x)
    """
    q, variance = event.sample_rate, event.noise_multiplier**2
    if direction == "replace":
        return np.sign(losses) * _replace_thresholds(np.abs(losses), q, variance)
    log_mixture = -losses if direction == "add" else losses
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.log((np.expm1(np.minimum(log_mixture, 30.0)) + q) / q)
    far = log_mixture + np.log1p(-(1 - q) * np.exp(-np.maximum(log_mixture, 1.0))) - math.log(q)
    exponent = np.where(log_mixture < 30.0, np.nan_to_num(near, nan=-np.inf, neginf=-np.inf), far)
    return variance * exponent + 0.5


def _replace_thresholds(losses: Array, q: float, variance: float) -> Array:
    """For losses >= 0, where the loss is odd in x: a quadratic in e^{x/σ²}, in log space."""
    if q == 1:
        return variance * losses / 2
    half = math.log(q) - 0.5 / variance
    with np.errstate(divide="ignore"):
        log_b = math.log1p(-q) + losses + np.log(-np.expm1(-losses))
    log_root = 0.5 * np.logaddexp(2 * log_b, math.log(4) + 2 * half + losses)
    return variance * (np.logaddexp(log_b, log_root) - math.log(2) - half)


def falling_root(function: Any, value: float, high: float) -> float:
    """The point in [0, `high`] at which a falling positive `function` is `value`, in log scale."""
    from scipy.optimize import brentq

    target = math.log(value)

    def gap(epsilon: float) -> float:
        return math.log(max(function(epsilon), 1e-320)) - target

    while gap(high) > 0:
        high *= 2
    return float(brentq(gap, 0.0, high, xtol=1e-13, rtol=8.9e-16))
