"""Discretised privacy losses, and their composition with its relative accuracy kept in the tail.

A plain FFT composes masses to about steps · 1e-16 *absolute*: at δ = 1e-10 and 1e5 steps that is the
size of δ itself. Multiplying each mass by e^{t · loss} first (an exponential tilt) moves the bulk to
the losses around ε, where the FFT is accurate; dividing the tilt out again leaves the *relative*
error at steps · 1e-16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dptorch.accounting.dominating import Array, Direction, log_ratios, thresholds
from dptorch.accounting.events import SampledGaussian

__all__ = ["Discretised", "LossTail", "compose", "connect_the_dots"]

_SLACK = 2e-15  # of the total, per step: a wide margin over the FFT's and the powers' rounding
_REACH = 12.0  # standard deviations kept around the tilted mean
_FARTHEST = 12.5  # standard deviations put on the grid: what is beyond has mass e^-80


@dataclass(frozen=True)
class Discretised:
    """`steps` equal losses on a grid.

    Attributes:
        masses: [n] probabilities of the losses (lowest + 0..n-1) · interval.
        lowest: index of the first loss.
        infinite: probability of an infinite loss.
        steps: how often it is composed with itself.
    """

    masses: Array
    lowest: int
    infinite: float
    steps: int


@dataclass(frozen=True)
class LossTail:
    """A composed loss distribution, right of some loss far below the ε it was made for.

    Attributes:
        losses: [n] rising.
        log_scale: common factor, in log, of `tilted`.
        tilt: t.
        tilted: [n] masses times e^{t · loss - log_scale}.
        slack: bound on the summed error of `tilted`, rounding and cut-off tails.
        infinite: probability of an infinite loss.
    """

    losses: Array
    log_scale: float
    tilt: float
    tilted: Array
    slack: float
    infinite: float

    def delta(self, epsilon: float) -> float:
        """Upper bound on Σ mass · (1 - e^{ε - loss})_+ ; in [0, 1]."""
        start = int(np.searchsorted(self.losses, epsilon, side="right"))
        gain = self.losses[start:] - epsilon
        factor = np.exp(-self.tilt * gain) * -np.expm1(-gain)
        total = float(self.tilted[start:] @ factor) + self.slack
        exponent = self.log_scale - self.tilt * epsilon
        finite = math.exp(min(exponent + math.log(total), 0.0)) if total > 0 else 0.0
        return min(1.0, finite + self.infinite)

    def epsilon(self, delta: float) -> float:
        """The smallest ε >= 0 with `delta(ε) <= delta`, to 1e-12; inf where there is none."""
        from scipy.optimize import brentq

        if self.infinite >= delta:
            return math.inf
        if self.delta(0.0) <= delta:
            return 0.0
        high = max(1.0, 1.05 * self.middle)
        while self.delta(high) > delta:
            if high > 2 * float(self.losses[-1]) + 1e3:
                return math.inf
            high *= 2
        target = math.log(delta)
        root = float(
            brentq(lambda e: math.log(max(self.delta(e), 1e-320)) - target, 0.0, high, xtol=1e-12, rtol=1e-14)
        )
        nudge = 1e-12 * max(1.0, root)
        while self.delta(root) > delta:
            root, nudge = root + nudge, 2 * nudge
        return root

    @cached_property
    def middle(self) -> float:
        """The tilted mean: the ε around which the tail is most accurate."""
        return max(0.0, float(self.tilted @ self.losses / self.tilted.sum()))


def connect_the_dots(event: SampledGaussian, direction: Direction, interval: float) -> Discretised:
    """Put the loss of one step on the grid of multiples of `interval` so that δ(ε) only grows.

    δ is convex in e^ε; the discrete loss's δ is its linear interpolation through the grid points,
    hence above it (Doroshenko et al. 2022, arXiv:2207.04380, section 3). What lies between two grid
    points is split between them so that its mass under P and under Q is kept; each cell's masses
    are taken from the nearer tail, so a mass of 1e-30 keeps its digits.

    Guarantees:
        The composed result's δ(ε) is at least that of `event`, at every ε.

    Example:
        >>> part = connect_the_dots(SampledGaussian(1.0, 0.01, steps=5), "remove", 1e-3)
        >>> abs(part.masses.sum() + part.infinite - 1) < 1e-12
        True
    """
    sigma, rate = event.noise_multiplier, event.sample_rate
    side = _FARTHEST * sigma
    ends = {"remove": (-side, 1 + side), "add": (-side, side), "replace": (-1 - side, 1 + side)}
    log_p, log_q = log_ratios(np.array(ends[direction]), event, direction)
    low, high = sorted((log_p - log_q).tolist())
    first, last = math.floor(low / interval), math.ceil(high / interval)
    grid = interval * np.arange(first, last + 1)
    x = thresholds(grid, event, direction)
    if direction == "add":
        x[0], edges = np.inf, np.concatenate([x, [-np.inf]])[::-1]
    else:
        x[0], edges = -np.inf, np.concatenate([x, [np.inf]])
    # [n] masses between grid[i] and grid[i+1]; the last is what lies above the grid.
    outside = _normal_masses(edges / sigma)
    hit = (1 - rate) * outside + rate * _normal_masses((edges - 1) / sigma)
    if direction == "replace":
        p, q = hit, (1 - rate) * outside + rate * _normal_masses((edges + 1) / sigma)
    elif direction == "remove":
        p, q = hit, outside
    else:
        p, q = outside[::-1], hit[::-1]
    with np.errstate(over="ignore", invalid="ignore"):
        excess = np.nan_to_num(p - np.exp(grid) * q, nan=np.inf, posinf=np.inf)
    risen = np.clip(excess / -math.expm1(-interval), 0.0, p)
    infinite = float(np.clip(excess[-1], 0.0, p[-1]))
    masses = p - risen
    masses[-1] = p[-1] - infinite
    masses[1:] += risen[:-1]
    return Discretised(masses, first, infinite, event.steps)


def _normal_masses(edges: Array) -> Array:
    """N(0, 1)'s masses between rising edges; [n+1] to [n]."""
    from scipy.special import ndtr

    low, high = edges[:-1], edges[1:]
    mirrored = low > 0
    return np.abs(ndtr(np.where(mirrored, -low, high)) - ndtr(np.where(mirrored, -high, low)))


def compose(parts: Sequence[Discretised], interval: float, tilt: float) -> LossTail:
    """Compose `parts`, exponentially tilted by `tilt`.

    Guarantees:
        `LossTail.delta` is at least the δ of the composed `parts` for any tilt > 0: what the
        window cuts off at the top is bounded by the moments bound and added, what it wraps around
        only adds. Tight near the ε whose saddle `tilt` is.

    Example:
        >>> half = Discretised(np.array([0.5, 0.5]), lowest=0, infinite=0.0, steps=2)
        >>> tail = compose([half], interval=1.0, tilt=0.5)
        >>> round(tail.delta(0.0), 9)  # 1/2 (1 - 1/e) + 1/4 (1 - 1/e²)
        0.532226525
    """
    from scipy import fft

    tilted, logs, mean, variance, longest = [], [], 0.0, 0.0, 1
    for part in parts:
        index = np.arange(part.masses.size)
        with np.errstate(divide="ignore"):
            logs_k = np.log(part.masses) + tilt * interval * index
        peak = float(logs_k.max())
        scaled = np.exp(logs_k - peak)
        total = float(scaled.sum())
        scaled /= total
        first = float(scaled @ index)
        mean += part.steps * first
        variance += part.steps * float(scaled @ (index - first) ** 2)
        longest = max(longest, part.masses.size)
        tilted.append(scaled)
        logs.append(part.steps * (math.log(total) + peak + tilt * interval * part.lowest))

    support = sum(part.steps * (part.masses.size - 1) for part in parts)
    spread = math.sqrt(variance)
    # Beyond the mean the weight e^{-t·loss} alone makes masses negligible after 50/t.
    reach = _REACH * spread + min(50.0 / (tilt * interval), 4.0 * _REACH * spread) + longest / 8
    below, above = math.ceil(_REACH * spread) + 1, math.ceil(reach) + 1
    size = fft.next_fast_len(max(min(below + above, support + 1), longest), real=True)
    first_index = 0 if size > support else max(0, round(mean) - below)

    spectrum: Array | complex = 1.0
    for part, masses in zip(parts, tilted, strict=True):
        spectrum = spectrum * fft.rfft(masses, size) ** part.steps
    wrapped = fft.irfft(spectrum, size)
    composed = np.maximum(np.roll(wrapped, -(first_index % size)), 0.0)

    offset = sum(part.steps * part.lowest for part in parts)
    losses = interval * (offset + first_index + np.arange(size))
    steps = sum(part.steps for part in parts)
    top = 0.0 if size > support else _upper_tail(parts, tilted, first_index + size)
    infinite = -math.expm1(sum(part.steps * math.log1p(-part.infinite) for part in parts))
    log_scale = math.fsum(logs)
    return LossTail(losses, log_scale, tilt, composed, steps * _SLACK + top, infinite)


def _upper_tail(parts: Sequence[Discretised], tilted: Sequence[Array], end: int) -> float:
    """Moments bound on the tilted probability of an index of at least `end`."""
    best = 0.0
    size = max(masses.size for masses in tilted)
    for order in np.geomspace(1e-3, 50.0, 40) / size:
        exponent = -float(order) * end
        for part, masses in zip(parts, tilted, strict=True):
            index = np.arange(masses.size)
            exponent += part.steps * math.log(float(masses @ np.exp(order * index)))
        best = min(best, exponent)
    return math.exp(best)
