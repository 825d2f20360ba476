"""Dominating pairs of a step: the worst pair of output distributions, with closed forms.

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
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dptorch.errors import PrivacyError

__all__ = [
    "MOST_NODES",
    "NEGLIGIBLE",
    "Direction",
    "Pair",
    "SampledPair",
    "Unsettled",
    "amplified_delta",
    "falling_root",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_mu",
    "gaussian_mu_for",
    "log_one_plus_ratio",
    "normal_masses",
]

Direction = Literal["remove", "add", "replace"]
Array = NDArray[Any]
NEGLIGIBLE = 44.0  # e^-44 is below one rounding of the largest term
MOST_NODES = 5_000_000  # of a quadrature; more take more memory and time than they are worth


class Unsettled(PrivacyError):
    """A quadrature did not pass its own checks within its limit of work."""


class Pair(Hashable, Protocol):
    """`steps` equal dominating pairs, by their privacy loss L = log dP/dQ under P.

    Attributes:
        steps: how often the pair is composed with itself.
        mu: where P, Q are N(mu, 1), N(0, 1) themselves: mu; otherwise None.
        largest_loss: supremum of L of one pair.
    """

    @property
    def steps(self) -> int: ...

    @property
    def mu(self) -> float | None: ...

    @property
    def largest_loss(self) -> float: ...

    def one_step_delta(self, epsilon: float) -> float:
        """H_{e^ε}(P, Q) of one pair, for ε >= 0; in closed form where there is one."""

    def loss_ends(self, tail: float) -> tuple[float, float]:
        """Return the range of one pair's loss, without e^`tail` of its mass at either end."""

    def nodes(self, t: float, height: float, tail: float | None) -> tuple[Array, Array]:
        """A quadrature for E_P[e^{(t+iy)L}], |y| <= `height`: [n] log masses and [n] losses.

        P may lose e^`tail` of its mass where L is large; None loses nothing.
        """

    def cells(
        self, interval: float, tail: float, reach: float = math.inf
    ) -> tuple[int, Array, Array]:
        """Masses of the loss between grid points `interval` · (first + 0..n-1).

        The grid covers `loss_ends(tail)`, as far as that lies within ± `reach`.

        Returns:
            first: index of the first grid point.
            p: [n] P's masses between a point and the next; the first also holds what lies below the
                grid, the last all that lies above.
            q: [n] Q's masses, likewise; 0 where P's mass counts as of infinite loss.
        """


@dataclass(frozen=True)
class SampledPair:
    """The pairs of the Gaussian-noised sum over a Poisson sample; formulas at the top of this file.

    Attributes:
        direction: which of the three pairs.
        noise_multiplier: σ > 0.
        sample_rate: q in (0, 1].
        steps: how often it is composed with itself.
    """

    direction: Direction
    noise_multiplier: float
    sample_rate: float
    steps: int

    @property
    def mu(self) -> float | None:
        """Sensitivity over noise where nothing is sampled, else None: the pair is no Gaussian."""
        return self._distance / self.noise_multiplier if self.sample_rate == 1 else None

    @property
    def _distance(self) -> float:
        return 2.0 if self.direction == "replace" else 1.0

    @property
    def largest_loss(self) -> float:
        """Largest privacy loss. It is finite only in the direction `add`."""
        if self.direction != "add" or self.sample_rate == 1:
            return math.inf
        return -math.log1p(-self.sample_rate)

    def log_ratios(self, x: Array) -> tuple[Array, Array]:
        """Return log P(x)/N(0)(x) and log Q(x)/N(0)(x), float64 of x's shape.

        Example:
            >>> log_p, log_q = SampledPair("remove", 1.0, 0.01, 1).log_ratios(np.array([0.5]))
            >>> float(log_p[0]), float(log_q[0])
            (0.0, 0.0)
        """
        zero = np.zeros_like(x)
        up = _log_mixture((x - 0.5) / self.noise_multiplier**2, self.sample_rate)
        if self.direction == "remove":
            return up, zero
        if self.direction == "add":
            return zero, up
        return up, _log_mixture((-x - 0.5) / self.noise_multiplier**2, self.sample_rate)

    def thresholds(self, losses: Array) -> Array:
        """The x at which the privacy loss is `losses`; [n] to [n].

        The loss rises with x for `remove` and `replace` and falls for `add`. A loss below the
        smallest (above the largest, for `add`) gives -inf.

        Example:
            >>> x = np.array([-1.0, 0.5, 3.0])
            >>> for direction in ("remove", "add", "replace"):
            ...     pair = SampledPair(direction, noise_multiplier=2.0, sample_rate=0.25, steps=1)
            ...     log_p, log_q = pair.log_ratios(x)
            ...     assert np.allclose(pair.thresholds(log_p - log_q), x)
        """
        q, variance = self.sample_rate, self.noise_multiplier**2
        if self.direction == "replace":
            return np.sign(losses) * _replace_thresholds(np.abs(losses), q, variance)
        # Solve for the exponent of the mixture. Near loss 0, expm1 keeps the digits that dividing by a
        # tiny q brings out. Far out, e^loss would overflow.
        log_mixture = -losses if self.direction == "add" else losses
        with np.errstate(divide="ignore", invalid="ignore"):
            near = np.log((np.expm1(np.minimum(log_mixture, 30.0)) + q) / q)
        # What divides by zero or less here is of the other branch.
        far = log_mixture + np.log1p(-(1 - q) * np.exp(-np.maximum(log_mixture, 1.0)))
        near = np.nan_to_num(near, nan=-np.inf, neginf=-np.inf)
        return variance * np.where(log_mixture < 30.0, near, far - math.log(q)) + 0.5

    def one_step_delta(self, epsilon: float) -> float:
        """H_{e^ε}(P, Q) of one step, in closed form.

        `remove` and `add` by amplification (`amplified_delta`); `replace` is a half-line's masses.

        Example:
            >>> round(SampledPair("remove", 1.0, 0.01, 1).one_step_delta(0.1994504), 9)
            1e-05
        """
        from scipy.special import ndtr

        q, sigma = self.sample_rate, self.noise_multiplier
        if self.direction == "remove":
            return amplified_delta(epsilon, q, 1 / sigma)
        if self.direction == "add":
            if epsilon >= self.largest_loss:
                return 0.0
            weight = -math.expm1(epsilon + math.log1p(-q)) if q < 1 else 1.0
            inner = epsilon + math.log(q) - math.log(weight)
            return weight * gaussian_delta(max(inner, 0.0), 1 / sigma)
        start = float(self.thresholds(np.array([epsilon]))[0])
        outside = (1 - q) * ndtr(-start / sigma)
        p_mass = outside + q * ndtr((1 - start) / sigma)
        q_mass = outside + q * ndtr((-1 - start) / sigma)
        return max(0.0, float(p_mass - math.exp(min(epsilon, 700.0)) * q_mass))

    def loss_ends(self, tail: float) -> tuple[float, float]:
        """See `Pair.loss_ends`."""
        side = math.sqrt(-2 * tail) * self.noise_multiplier
        left = -1 - side if self.direction == "replace" else -side
        right = side if self.direction == "add" else 1 + side
        log_p, log_q = self.log_ratios(np.array([left, right]))
        low, high = sorted((log_p - log_q).tolist())
        return low, high

    def cells(
        self,
        interval: float,
        tail: float,
        reach: float = math.inf,
        ends: tuple[float, float] | None = None,
    ) -> tuple[int, Array, Array]:
        """See `Pair.cells`; `ends` takes the place of `loss_ends(tail)`."""
        sigma, rate = self.noise_multiplier, self.sample_rate
        low, high = ends or self.loss_ends(tail)
        first = math.floor(max(low, -reach) / interval)
        last = math.ceil(min(high, reach) / interval)
        x = self.thresholds(interval * np.arange(first, last + 1))
        if self.direction == "add":
            x[0], edges = np.inf, np.concatenate([x, [-np.inf]])[::-1]
        else:
            x[0], edges = -np.inf, np.concatenate([x, [np.inf]])
        outside = normal_masses(edges / sigma)
        hit = (1 - rate) * outside + rate * normal_masses((edges - 1) / sigma)
        if self.direction == "replace":
            return first, hit, (1 - rate) * outside + rate * normal_masses((edges + 1) / sigma)
        if self.direction == "remove":
            return first, hit, outside
        return first, outside[::-1], hit[::-1]

    def nodes(self, t: float, height: float, tail: float | None) -> tuple[Array, Array]:
        """The trapezoid rule in x; see `Pair.nodes`."""
        sigma = self.noise_multiplier
        left, right = self._ends(t, tail)
        slope = self._distance / sigma**2
        # N's spectrum ends at 9/σ; e^{iyL} shifts it by y·slope; L is analytic within |Im x| < πσ².
        gap = min(sigma / 6, 0.5 * sigma**2, 2 * math.pi / (2 * height * slope + 9.5 / sigma))
        if (right - left) / gap > MOST_NODES:
            raise Unsettled(f"the contour integral does not settle for {self}")
        x = gap * np.arange(math.floor(left / gap), math.ceil(right / gap) + 1)
        log_p, log_q = self.log_ratios(x)
        losses = log_p - log_q
        scale = math.log(gap / (sigma * math.sqrt(2 * math.pi)))
        log_masses = log_p - 0.5 * (x / sigma) ** 2 + scale
        if tail is not None:
            log_masses += self._taper(x, left, right)
        # A node costs the same whatever its weight, and many weigh nothing.
        weights = log_masses + np.maximum(t * losses, 0.0)
        keep = weights > max(float(weights.max()), 0.0) - NEGLIGIBLE
        return log_masses[keep], losses[keep]

    def _ends(self, t: float, tail: float | None) -> tuple[float, float]:
        sigma = self.noise_multiplier
        if tail is not None:
            # e^tail lies beyond sqrt(-2 tail) deviations, and the taper takes 5 more.
            side = sigma * max(9.5, math.sqrt(-2 * tail) + 5.0)
            return -side, side if self.direction == "add" else 1.0 + side
        # How far dividing by (1-q) + q e^{..} pulls the mass: at most t, and only while q e^{..}
        # counts.
        odds = self.sample_rate / (1 - self.sample_rate)
        pull = min(t, sigma**2 * (1 + math.log1p(t * odds / sigma**2)))
        left = -pull if self.direction == "add" else 0.0
        right = {"remove": t + 1.0, "add": 0.0, "replace": t + 1.0 + pull}[self.direction]
        return left - 9.5 * sigma, right + 9.5 * sigma  # a normal's mass beyond is 1e-21

    def _taper(self, x: Array, left: float, right: float) -> Array:
        """log of a smooth step from 1 to 0 over the last 5σ before the end where the loss is large.

        A sharp end would cost the trapezoid rule its exponential accuracy.
        """
        from scipy.special import log_ndtr

        distance = (x - left) if self.direction == "add" else (right - x)
        taper: Array = log_ndtr(math.sqrt(8.0) * (distance / self.noise_multiplier - 3.0))
        return taper


def _log_mixture(exponent: Array, rate: float) -> Array:
    """log(1 - rate + rate e^exponent), exact to rounding also where the result is near 0."""
    if rate == 1:
        return exponent
    near = np.log1p(rate * np.expm1(np.minimum(exponent, 30.0)))
    far = np.logaddexp(math.log1p(-rate), math.log(rate) + exponent)
    return np.where(exponent < 30.0, near, far)


def gaussian_mu(pairs: Sequence[Pair]) -> float | None:
    """μ of the Gaussian mechanism that `pairs` compose to, exactly; None where one is no Gaussian.

    Example:
        >>> gaussian_mu([SampledPair("remove", 10.0, sample_rate=1.0, steps=100)])
        1.0
    """
    squares = []
    for pair in pairs:
        if pair.mu is None:
            return None
        squares.append(pair.steps * pair.mu**2)
    return math.sqrt(math.fsum(squares))


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ(ε) of N(μ, 1) against N(0, 1) (Balle and Wang 2018, arXiv:1805.06530, Theorem 8).

    Guarantees:
        Accurate to about 1e-13 relative, also where δ is far below 1e-16.
        Held by `test_gaussian_delta_by_multi_precision`.

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


@lru_cache(maxsize=64)
def gaussian_mu_for(epsilon: float, delta: float) -> float:
    """The largest mu at which `gaussian_delta(epsilon, mu)` is at most `delta`.

    Example:
        >>> round(1 / gaussian_mu_for(1.0, 1e-5), 4)
        3.7306
    """
    low, high = 0.0, 1.0
    while gaussian_delta(epsilon, high) <= delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if gaussian_delta(epsilon, middle) <= delta:
            low = middle
        else:
            high = middle
    return low


def amplified_delta(epsilon: float, q: float, mu: float) -> float:
    """H_{e^ε}((1-q) N(0, 1) + q N(mu, 1), N(0, 1)) for ε >= 0, in closed form.

    Amplification by sampling (Balle, Barthe, Gaboardi 2018, arXiv:1807.01647, Theorem 2): the
    Gaussian's δ at another ε.
    """
    return q * gaussian_delta(log_one_plus_ratio(epsilon, q), mu)


def normal_masses(edges: Array) -> Array:
    """N(0, 1)'s masses between rising edges; [n+1] to [n]. Each is taken from the nearer tail."""
    from scipy.special import ndtr

    low, high = edges[:-1], edges[1:]
    mirrored = low > 0
    return np.abs(ndtr(np.where(mirrored, -low, high)) - ndtr(np.where(mirrored, -high, low)))


def log_one_plus_ratio(epsilon: float, q: float) -> float:
    """log(1 + (e^ε - 1) / q) without overflow."""
    if epsilon < 30:
        return math.log1p(math.expm1(epsilon) / q)
    return epsilon - math.log(q) + math.log1p(-(1 - q) * math.exp(-epsilon))


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
