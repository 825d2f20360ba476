"""δ(ε) of a composition by inverting the privacy loss's moment generating function.

With K(z) = Σ steps · log E_P[e^{zL}] of a dominating pair (`dominating`), for any t > 0

    δ(ε) = 1/(2πi) ∫_{t-i∞}^{t+i∞} e^{K(z) - zε} / (z (1+z)) dz

(Alghamdi et al., The Saddle-Point Method in Differential Privacy, ICML 2023, Theorem 3.1). The line
is put through the saddle of the integrand's modulus, where the integral has no cancellation, so δ
keeps its relative accuracy however small it is. Before that, P loses the far tail in which δ cannot
change by more than e^-28 of itself: the tail's e^{tL} would otherwise hold the saddle at a t far
too small for the rest. Three discretisations are made, each with its own check:

* x, inside E_P: the trapezoid rule, whose step resolves the fastest oscillation e^{iyL} on the line;
* y, along the line: the trapezoid rule, checked against the rule with twice the step;
* the line's end: few steps at a low rate leave an integrand that hardly decays. A smooth cut-off
  (an erfc in y) removes only what is faster than the loss's density *near ε*; checked against a
  cut-off at 5/8 of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dptorch.accounting.pairs.sampled import Array, Pair, Unsettled

__all__ = [
    "Unsettled",
    "contour_delta",
    "contour_epsilon",
    "log_mgf",
    "moments_bound",
    "negligible_tail",
    "saddle",
]

_TOLERANCE = 1e-8  # relative, in δ, between a rule and its coarser check
_WORST_TOLERANCE = 1e-6  # where rounding leaves no better
_LOG_SMALLEST = -740.0  # below e^-740 a float64 δ is 0
_WORK_LIMIT = 2e8  # points in x times points in y: about a second


@dataclass(frozen=True)
class _Line:
    """K on the line t + iy, and the quadrature in y.

    Attributes:
        t: real part.
        y: [n] heights, from 0, evenly spaced.
        k0: K(t).
        shape: [n] complex, e^{K(t+iy) - K(t)} / (z (1+z)).
        error: absolute rounding error of K.
    """

    t: float
    y: Array
    k0: float
    shape: Array
    error: float

    def log_delta(self, epsilon: float, cut: float = 1.0, stride: int = 1) -> tuple[float, float]:
        """log δ(ε) and its derivative in ε; `cut` shortens the line, `stride` coarsens the step."""
        from scipy.special import erfc

        y = self.y[::stride]
        height = cut * self.y[-1]
        # From 1 to 0 around half of the height; at its end erfc(6) / 2 = 1e-17.
        weight = 0.5 * erfc(12.0 * (y / height - 0.5)) * (y[1] - y[0]) / math.pi
        # Both halves of the line are conjugate: twice the real part of one, but for their common point.
        weight[0] *= 0.5
        terms = self.shape[::stride] * np.exp(-1j * epsilon * y) * weight
        total = float(terms.real.sum())
        slope = float((-(self.t + 1j * y) * terms).real.sum())
        if not total > 0:
            return -math.inf, -math.inf
        return self.k0 - self.t * epsilon + math.log(total), slope / total

    def rounding(self, epsilon: float) -> float:
        """Relative error of δ(ε) by the rounding of K."""
        size = float(np.abs(self.shape).sum()) * (self.y[1] - self.y[0]) / math.pi
        log_delta = self.log_delta(epsilon)[0]
        scale = math.exp(min(self.k0 - self.t * epsilon - log_delta, 600.0))
        return (self.error + 1e-16) * size * scale


def contour_delta(pairs: Sequence[Pair], epsilon: float, floor: float = 0.0) -> float:
    """δ(ε) of `pairs` composed in one direction, or `floor` if that is larger.

    Args:
        pairs: the dominating pairs of one direction.
        epsilon: at least 0.
        floor: return this as soon as it is known that δ is not above it.

    Guarantees:
        Relative error about 1e-9, by the checks above; not certified by a theorem.
        Held by `test_two_steps_by_integration` and `test_contour_meets_the_closed_forms`.

    Raises:
        Unsettled: the checks do not pass within the work limit.

    Example:
        >>> from dptorch.accounting.pairs.sampled import SampledPair
        >>> pair = SampledPair("remove", noise_multiplier=1.0, sample_rate=0.01, steps=1000)
        >>> f"{contour_delta([pair], 1.8282367):.4e}"
        '1.0000e-05'
    """
    if epsilon >= sum(pair.steps * pair.largest_loss for pair in pairs):
        return floor
    # 1 - δ = E_P[min(1, e^{ε-L})] <= E_P[e^{(ε-L)/2}]
    if epsilon / 2 + log_mgf(pairs, -0.5, negligible_tail(pairs, -37.0)) < -28.0:
        return 1.0
    log_floor = math.log(floor) if floor > 0 else -math.inf
    smallest = max(-37.0, log_floor)  # e^-37 = 1e-16: few are asked for a smaller δ
    while True:
        tail = negligible_tail(pairs, smallest)
        t, bound = saddle(pairs, epsilon, tail)
        value = -math.inf
        if bound > max(_LOG_SMALLEST, log_floor):
            value = _converged_line(pairs, t, epsilon, tail).log_delta(epsilon)[0]
        if value >= smallest:
            return min(1.0, math.exp(value))
        if smallest <= max(_LOG_SMALLEST, log_floor):
            return floor
        # δ is smaller than the tail was chosen for: keep more of the tail.
        smallest = max(2 * smallest, _LOG_SMALLEST)


def negligible_tail(pairs: Sequence[Pair], log_delta: float) -> float:
    """The log of a mass that every step may lose without changing a δ of e^log_delta.

    Example:
        >>> from dptorch.accounting.pairs.sampled import SampledPair
        >>> negligible_tail([SampledPair("remove", 1.0, 0.01, 1000)], math.log(1e-5))
        -47
    """
    # All steps together then lose e^-28 = 7e-13 of δ. Whole numbers, so that near δs share caches.
    return math.floor(log_delta - math.log(sum(pair.steps for pair in pairs)) - 28)


def contour_epsilon(pairs: Sequence[Pair], delta: float, floor: float = 0.0) -> float:
    """The ε at which `pairs` composed in one direction have δ(ε) = `delta`, or `floor`.

    Args:
        floor: return this as soon as it is known that ε is not above it.

    Guarantees:
        As `contour_delta`: about 1e-9 / t in ε, t being the saddle.
        Held by `test_exact_meets_the_reference`.

    Example:
        >>> from dptorch.accounting.pairs.sampled import SampledPair
        >>> pair = SampledPair("remove", noise_multiplier=1.0, sample_rate=0.01, steps=1000)
        >>> round(contour_epsilon([pair], 1e-5), 7)
        1.8282367
    """
    target = math.log(delta)
    tail = negligible_tail(pairs, target)
    t, epsilon = moments_bound(pairs, target, tail)
    if epsilon <= floor:
        return floor
    for _ in range(30):
        line = _converged_line(pairs, t, epsilon, tail)
        previous, epsilon = epsilon, _newton(line, epsilon, target)
        if epsilon <= floor:
            # The line was placed for another ε: decide at the floor itself.
            if contour_delta(pairs, floor) <= delta:
                return floor
            return _bisect(pairs, target, floor, previous)
        if abs(epsilon - previous) < max(1e-3 / line.t, 1e-12):
            return epsilon
        t, _ = saddle(pairs, epsilon, tail, start=line.t)
    raise Unsettled(f"the contour integral for delta={delta} did not settle in 30 rounds")


def _newton(line: _Line, epsilon: float, target: float) -> float:
    """Solve log δ(ε) = target on one line: log δ is concave enough there for a few steps."""
    for _ in range(40):
        value, slope = line.log_delta(epsilon)
        if not slope < 0:
            return epsilon * 0.5
        # Far from the saddle the line loses accuracy, so a step stays within its reach.
        reach = 3.0 / line.t
        step = min(max((target - value) / slope, -reach), reach)
        epsilon += step
        if abs(step) < 1e-13 * max(1.0, epsilon) or abs(step) == reach:
            break
    return epsilon


def _bisect(pairs: Sequence[Pair], target: float, low: float, high: float) -> float:
    from scipy.optimize import brentq

    def gap(epsilon: float) -> float:
        return math.log(max(contour_delta(pairs, epsilon), 1e-320)) - target

    return float(brentq(gap, low, max(high, low + 1e-6), xtol=1e-12))


def moments_bound(pairs: Sequence[Pair], target: float, tail: float) -> tuple[float, float]:
    """A t near the saddle for δ = e^target, and the moments bound's ε there.

    The bound holds for P without its `tail`, so for a δ larger by a factor 1 + e^-28.

    δ <= e^{K(t) - tε} t^t / (1+t)^{1+t} (Canonne, Kamath, Steinke 2020, arXiv:2004.00010, Cor. 13).
    """

    def bound(log_t: float) -> float:
        t = math.exp(log_t)
        k = log_mgf(pairs, t, tail)
        return (k + t * log_t - (1 + t) * math.log1p(t) - target) / t

    # In log t: the best t may lie many orders of magnitude away.
    log_t = _valley(bound, 1.0)
    return math.exp(log_t), bound(log_t)


def saddle(
    pairs: Sequence[Pair],
    epsilon: float,
    tail: float,
    start: float = 3.0,
) -> tuple[float, float]:
    """The t that minimises the integrand's modulus, and an upper bound on log δ there."""

    def modulus(log_t: float) -> float:
        t = math.exp(log_t)
        return log_mgf(pairs, t, tail) - t * epsilon - log_t - math.log1p(t)

    log_t = _valley(modulus, math.log(start))
    t = math.exp(log_t)
    bound = modulus(log_t) + (1 + t) * log_t - t * math.log1p(t)
    return t, bound


def _valley(function: Callable[[float], float], start: float) -> float:
    """Minimise a one-valley function of log t to about 1e-2, within [e^-40, e^14]."""
    from scipy.optimize import minimize_scalar

    step, middle = 1.0, start
    value = function(middle)
    side = -step if function(middle - step) < value else step
    while -40.0 < middle + side < 14.0:
        ahead = function(middle + side)
        if not ahead < value:
            break
        middle, value = middle + side, ahead
    found = minimize_scalar(
        function, bounds=(middle - step, middle + step), method="bounded", options={"xatol": 1e-2}
    )
    return float(found.x)


def _converged_line(
    pairs: Sequence[Pair],
    t: float,
    epsilon: float,
    tail: float,
) -> _Line:
    """A line on which δ(ε) passes both checks."""
    # What decides how fine and how long: the integrand's width, and how deep it lies below the copies.
    bend = 0.05 * t
    k_low, k_mid, k_high = (log_mgf(pairs, s, tail) for s in (t - bend, t, t + bend))
    # The second difference of K is the tilted loss's variance: the integrand is 1 / spread wide.
    spread = math.sqrt(max(k_low + k_high - 2 * k_mid, 1e-30)) / bend
    depth = max(0.0, -(k_mid - t * epsilon - math.log(t) - math.log1p(t)))
    # The rule with step s sees copies of δ at distance 2π/s; they must be negligible at both sides.
    distance = 2.0 * max((depth + 30.0) / t, 9.0 * spread)
    # 9 deviations of the integrand, and twice that, as the cut-off takes half of the height.
    height = 18.0 * max(1.0 / spread, 0.05 * t)
    while True:
        count = 2 * math.ceil(height * distance / (4 * math.pi)) + 1
        line = _line(pairs, t, 2 * math.pi / distance, max(count, 33), tail)
        fine = line.log_delta(epsilon)[0]
        rounding = line.rounding(epsilon)
        if 10 * _WORST_TOLERANCE < rounding < 1.0 and count > 1000:
            raise Unsettled(f"rounding leaves delta an error of {rounding:.1e}")
        tolerance = min(max(_TOLERANCE, rounding), _WORST_TOLERANCE)
        # The height first: on too short a line even the sign may be wrong, whatever the step.
        if not abs(fine - line.log_delta(epsilon, cut=0.625)[0]) < tolerance:
            height *= 2
        elif not abs(fine - line.log_delta(epsilon, stride=2)[0]) < tolerance:
            distance *= 2
        else:
            return line


def _line(
    pairs: Sequence[Pair],
    t: float,
    step: float,
    count: int,
    tail: float,
) -> _Line:
    y = step * np.arange(count)
    z = t + 1j * y
    k = np.zeros(count, complex)
    rounding = 0.0
    for pair in pairs:
        values, error = _pair_log_mgf(pair, t, step, count, tail)
        k += values
        rounding += error
    k0 = float(k[0].real)
    return _Line(t, y, k0, np.exp(k - k0) / (z * (1 + z)), rounding)


def log_mgf(pairs: Sequence[Pair], t: float, tail: float | None = None) -> float:
    """K(t) = Σ steps · log E_P[e^{tL}]; K(λ-1) / (λ-1) is the Rényi divergence of order λ.

    Args:
        tail: log of the mass that P may lose in its far tail; None loses nothing.

    Guarantees:
        Absolute error about 1e-15 per step.
        Held by `test_log_mgf_by_multi_precision_integration`.

    Example:
        >>> from dptorch.accounting.pairs.sampled import SampledPair
        >>> gaussian = SampledPair("remove", noise_multiplier=2.0, sample_rate=1.0, steps=1)
        >>> log_mgf([gaussian], 3.0)  # t (1 + t) / (2 σ²)
        1.5
    """
    return math.fsum(_real_log_mgf(pair, t, tail) for pair in pairs)


@lru_cache(maxsize=4096)
def _real_log_mgf(pair: Pair, t: float, tail: float | None) -> float:
    return float(_pair_log_mgf(pair, t, 1.0, 1, tail)[0][0].real)


def _pair_log_mgf(
    pair: Pair,
    t: float,
    step: float,
    count: int,
    tail: float | None,
) -> tuple[Array, float]:
    """steps · log E_P[e^{zL}] at z = t + i·step·(0..count-1), [count] complex, and its rounding."""
    z = t + 1j * step * np.arange(count)
    if pair.mu is not None:
        return pair.steps * z * (z + 1) / 2 * pair.mu**2, 0.0

    log_masses, losses = pair.nodes(t, abs(z[-1].imag), tail)
    if losses.size * count > _WORK_LIMIT:
        raise Unsettled(f"the contour integral does not settle for {pair}")
    exponents = log_masses + t * losses
    largest = float(exponents.max())
    if largest > 40.0:  # E[e^{zL}] is so large that the 1 in it is below a rounding
        sums = _powers(np.exp(exponents - largest), losses, step, count)
        return pair.steps * (np.log(sums) + largest), 1e-15 * pair.steps
    # E[e^{zL}] - 1 = E[e^{zL} - 1]: by its series where |zL| is small (at low rates nearly
    # everywhere), so that no 1 is added to be taken off again.
    small = np.abs(losses) * abs(z[-1]) < 0.5
    rest = _exponential_series(np.exp(log_masses[small]), losses[small], z)
    p, tilted = np.exp(log_masses[~small]), np.exp(exponents[~small])
    if count == 1:
        rest += float((tilted - p).sum())
    else:
        rest += _powers(tilted, losses[~small], step, count) - float(p.sum())
    rounding = 2e-16 * pair.steps * float(tilted.sum() + p.sum() + abs(rest[0]))
    # log(1 + rest) from |1 + rest|², so that a small `rest` keeps its relative accuracy.
    squared = np.maximum(2 * rest.real + rest.real**2 + rest.imag**2, -1 + 1e-16)
    values = 0.5 * np.log1p(squared) + 1j * np.arctan2(rest.imag, 1 + rest.real)
    return pair.steps * values, rounding


def _exponential_series(masses: Array, losses: Array, z: Array) -> Array:
    """Σ_k masses_k (e^{z losses_k} - 1) for |z losses_k| < 0.5, by moments; [n] complex."""
    total = np.zeros_like(z)
    for order in range(14, 0, -1):  # 0.5^15 / 15! = 2e-17
        moment = float(masses @ losses**order) / math.factorial(order)
        total = (total + moment) * z
    return total


def _powers(weights: Array, losses: Array, step: float, count: int) -> Array:
    """Σ_k weights_k e^{i·step·j·losses_k} for j < count, as one matrix product.

    j = m·width + r splits e^{ij·} into two factors, so only about 2·sqrt(count) exponentials per
    node are taken.
    """
    if count == 1:
        return np.array([weights.sum()], complex)
    width = math.ceil(math.sqrt(count))
    rows = math.ceil(count / width)
    sums = np.zeros((rows, width), complex)
    # 64 MB of complex factors at a time.
    block = max(1, 4_000_000 // (rows + width))
    for start in range(0, weights.size, block):
        phase = step * losses[start : start + block]
        giant = np.exp(1j * width * np.outer(np.arange(rows), phase))
        giant *= weights[start : start + block]
        sums += giant @ np.exp(1j * np.outer(phase, np.arange(width)))
    return sums.ravel()[:count]
