"""Compose discretised privacy losses with their relative accuracy kept in the tail.

A plain FFT composes masses to about steps · 1e-16 *absolute*: at δ = 1e-10 and 1e5 steps that is the
size of δ itself. Multiplying each mass by e^{t · loss} first (an exponential tilt) moves the bulk to
the losses around ε, where the FFT is accurate; dividing the tilt out again leaves the *relative*
error at steps · 1e-16.

At a tiny sampling rate nearly all of a step's mass sits at one loss, and no tilt moves it without
moving everything. So the largest mass is kept out of the transforms: with a for it and g for the
transform of the rest, (a + g)^steps - a^steps = a^steps · expm1(steps · log1p(g / a)), whose error is
that of g, which is small where the rest is. The error is then steps · (1 - a) · 1e-16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dptorch.accounting.pairs.discretised import Discretised
from dptorch.accounting.pairs.sampled import Array
from dptorch.errors import PrivacyError

__all__ = ["LossTail", "compose"]

# Of what is transformed: a wide margin over the rounding of transforms and powers.
_SLACK = 2e-15
_ROUNDING = 1e-14  # relative, of the sum over the tail
_REACH = 12.0  # standard deviations kept around the tilted mean, at least
_LARGEST_WINDOW = 2**23


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
        total = float(self.tilted[start:] @ factor) * (1 + _ROUNDING) + self.slack
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
            brentq(
                lambda e: math.log(max(self.delta(e), 1e-320)) - target,
                0.0,
                high,
                xtol=1e-12,
                rtol=1e-14,
            )
        )
        nudge = 1e-12 * max(1.0, root)
        while self.delta(root) > delta:
            root, nudge = root + nudge, 2 * nudge
        return root

    @cached_property
    def middle(self) -> float:
        """The tilted mean: the ε around which the tail is most accurate."""
        return max(0.0, float(self.tilted @ self.losses / self.tilted.sum()))


def compose(parts: Sequence[Discretised], interval: float, tilt: float) -> LossTail:
    """Compose `parts`, exponentially tilted by `tilt`.

    Guarantees:
        `LossTail.delta` is at least the δ of the composed `parts` for any tilt > 0: what the
        window cuts off at the top is bounded by the moments bound and added, what it wraps around
        only adds. Tight near the ε whose saddle `tilt` is.
        Held by `test_tilted_composition_by_brute_force` and
        `test_the_tilt_matters_only_for_tightness`.

    Example:
        >>> half = Discretised(np.array([0.5, 0.5]), lowest=0, infinite=0.0, steps=2)
        >>> tail = compose([half], interval=1.0, tilt=0.5)
        >>> round(tail.delta(0.0), 9)  # 1/2 (1 - 1/e) + 1/4 (1 - 1/e²)
        0.532226459
    """
    from scipy import fft

    tilted, logs, mean, variance, longest = [], [], 0.0, 0.0, 1
    for part in parts:
        index = np.arange(part.masses.size)
        with np.errstate(divide="ignore"):
            logs_k = np.log(part.masses) + tilt * interval * index
        # By the largest first, as e^{tilt · loss} alone may overflow.
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
    # Expected number of steps whose loss is not the most probable one.
    moved = sum(
        part.steps * float(np.delete(masses, masses.argmax()).sum())
        for part, masses in zip(parts, tilted, strict=True)
    )
    slack = moved * _SLACK
    # An eighth of the longest part keeps single large losses inside the window.
    reach = _REACH * math.sqrt(variance)
    low, high = math.floor(mean - reach), math.ceil(mean + reach + longest / 8)
    above, below = _tail_bounds(parts, tilted)
    while high < support and above(high) > slack and high - low < _LARGEST_WINDOW:
        high += (high - low + 1) // 2
    # What lies below the window wraps around to its top: harmless, but it loosens the bound.
    while low > 0 and below(low) > 1e-13 and high - low < _LARGEST_WINDOW:
        low -= (high - low + 1) // 2
    low, high = max(low, 0), min(high, support)
    # At least the longest part, which would otherwise wrap around before it is composed.
    size = fft.next_fast_len(max(high - low + 1, longest), real=True)
    top = above(low + size) if low + size <= support else 0.0

    exponent, log_still, shift = np.zeros(size // 2 + 1, complex), 0.0, 0
    for part, masses in zip(parts, tilted, strict=True):
        most = int(masses.argmax())
        rest = np.zeros(size)
        rest[: masses.size] = masses
        rest[most] = 0.0
        # The sum of the rest has the digits that 1 - masses[most] has lost.
        still = 1 - float(rest.sum())
        exponent += part.steps * _log1p(fft.rfft(np.roll(rest, -most)) / still)
        log_still += part.steps * math.log1p(-float(rest.sum()))
        shift += part.steps * most
    if log_still > -1:
        wrapped = math.exp(log_still) * fft.irfft(np.expm1(exponent), size)
        wrapped[0] += math.exp(log_still)
    else:
        # Hardly anything stands still, and a^steps may be too small for a float.
        wrapped = fft.irfft(np.exp(exponent + log_still), size)
    if not np.isfinite(wrapped).all():
        raise PrivacyError("composing the privacy loss overflowed. Nothing is stated.")
    # Rounding leaves masses below 0. As 0 they only grow.
    composed = np.maximum(np.roll(wrapped, (shift - low) % size), 0.0)

    offset = sum(part.steps * part.lowest for part in parts)
    losses = interval * (offset + low + np.arange(size))
    infinite = -math.expm1(sum(part.steps * math.log1p(-part.infinite) for part in parts))
    log_scale = math.fsum(logs)
    return LossTail(losses, log_scale, tilt, composed, slack + top, infinite)


def _log1p(z: Array) -> Array:
    """log(1 + z) of complex z, exact to rounding also where z is near 0, as NumPy's is not."""
    squared = 2 * z.real + z.real**2 + z.imag**2
    # Near 1 + z = 0 it is |1 + z| itself that has the digits.
    modulus = np.log(np.maximum(np.abs(1 + z), 1e-300))
    real = np.where(squared > -0.5, 0.5 * np.log1p(np.maximum(squared, -0.5)), modulus)
    return real + 1j * np.arctan2(z.imag, 1 + z.real)


def _tail_bounds(
    parts: Sequence[Discretised], tilted: Sequence[Array]
) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Moments bounds on the tilted probability of an index >= end, and of one < start."""
    # Orders are relative to the longest part, over which e^{order · index} then stays below e^50.
    sizes = np.geomspace(1e-2, 50.0, 30) / max(masses.size for masses in tilted)
    logs = {1: np.zeros_like(sizes), -1: np.zeros_like(sizes)}
    for part, masses in zip(parts, tilted, strict=True):
        index = np.arange(masses.size)
        # Masses this small, times e^50, are below a rounding of the sum.
        keep = masses > 1e-40
        kept, at = masses[keep], index[keep]
        middle = float(kept @ at)
        for sign, totals in logs.items():
            for k, order in enumerate(sign * sizes):
                moment = float(kept @ np.exp(order * (at - middle)))
                totals[k] += part.steps * (math.log(moment) + order * middle)

    def bound(sign: int, limit: int) -> float:
        return math.exp(min(0.0, float((logs[sign] - sign * sizes * limit).min())))

    return lambda end: bound(1, end), lambda start: bound(-1, start)
