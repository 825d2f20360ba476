"""δ(ε) and ε(δ) of a composition in one direction, by whichever method is accurate there.

* sample_rate 1 throughout: the Gaussian's closed form;
* one step: the closed form of amplification by sampling;
* otherwise the contour integral;
* where that does not settle (few steps at a tiny rate: nearly all of the loss sits at one point),
  the discretised loss at two grid intervals, extrapolated to interval 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dptorch.accounting.composition import contour, tilted
from dptorch.accounting.pairs.discretised import connect_the_dots
from dptorch.accounting.pairs.sampled import (
    Pair,
    falling_root,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
)

__all__ = ["composed_delta", "composed_epsilon"]

# Points on the range of one step's loss, and the difference (in log δ) between a grid and the one
# twice as fine that is good enough: extrapolation leaves about 1/50 of it.
_GRIDS = ((2**15, 1e-4), (2**18, 1e-3))


def composed_delta(pairs: Sequence[Pair], epsilon: float, floor: float = 0.0) -> float:
    """δ(ε) of `pairs`, or `floor` where that is larger.

    Example:
        >>> from dptorch.accounting.pairs.sampled import SampledPair
        >>> pair = SampledPair("remove", noise_multiplier=1.0, sample_rate=0.01, steps=1000)
        >>> f"{composed_delta([pair], 1.8282367):.4e}"
        '1.0000e-05'
    """
    mu = gaussian_mu(pairs)
    if mu is not None:
        return max(floor, gaussian_delta(epsilon, mu))
    if sum(pair.steps for pair in pairs) == 1:
        return max(floor, pairs[0].one_step_delta(epsilon))
    try:
        return contour.contour_delta(pairs, epsilon, floor)
    except contour.Unsettled:
        return max(floor, _extrapolated_delta(pairs, epsilon))


def composed_epsilon(pairs: Sequence[Pair], delta: float, floor: float = 0.0) -> float:
    """The ε at which δ(ε) is `delta`, or `floor` where that is larger.

    Example:
        >>> from dptorch.accounting.pairs.sampled import SampledPair
        >>> pair = SampledPair("remove", noise_multiplier=1.0, sample_rate=0.01, steps=1000)
        >>> round(composed_epsilon([pair], 1e-5), 7)
        1.8282367
    """
    mu = gaussian_mu(pairs)
    if mu is not None:
        return max(floor, gaussian_epsilon(delta, mu))
    if sum(pair.steps for pair in pairs) == 1:
        if pairs[0].one_step_delta(floor) <= delta:
            return floor
        return falling_root(lambda e: pairs[0].one_step_delta(e), delta, floor + 1.0)
    # Total variation adds up: δ(0) is at most the sum of the steps'.
    if sum(pair.steps * pair.one_step_delta(0.0) for pair in pairs) <= delta:
        return floor
    try:
        return contour.contour_epsilon(pairs, delta, floor)
    except contour.Unsettled:
        return max(floor, _extrapolated_epsilon(pairs, delta))


def _extrapolated_delta(pairs: Sequence[Pair], epsilon: float) -> float:
    if epsilon >= sum(pair.steps * pair.largest_loss for pair in pairs):
        return 0.0
    tail = contour.negligible_tail(pairs, -80.0)
    tilt, _ = contour.saddle(pairs, epsilon, tail)
    for points, enough in _GRIDS:
        grids = _two_grids(pairs, tilt, tail, points)
        coarse, fine = (loss.delta(epsilon) for loss in grids)
        if fine <= 0:
            return 0.0
        if abs(math.log(coarse / fine)) < enough:
            return fine * (fine / coarse) ** (1 / 3)
    raise _unresolved(pairs)


def _extrapolated_epsilon(pairs: Sequence[Pair], delta: float) -> float:
    target = math.log(delta)
    tail = contour.negligible_tail(pairs, target)
    tilt, epsilon = contour.moments_bound(pairs, target, tail)
    for points, enough in _GRIDS:
        for _ in range(6):
            grids = _two_grids(pairs, tilt, tail, points)
            coarse, fine = (loss.epsilon(delta) for loss in grids)
            previous, epsilon = epsilon, max(fine - (coarse - fine) / 3, 0.0)
            # A tilt for a nearby ε is as good: the slack of `tilted` is then far below δ.
            if abs(epsilon - previous) <= 0.05 * epsilon:
                break
            tilt, _ = contour.saddle(pairs, epsilon, tail)
        if tilt * (coarse - fine) < enough:
            return epsilon
    raise _unresolved(pairs)


def _unresolved(pairs: Sequence[Pair]) -> contour.Unsettled:
    return contour.Unsettled(
        f"no method resolves {list(pairs)} at this epsilon and delta. Use accountant='rdp'."
    )


def _two_grids(
    pairs: Sequence[Pair],
    tilt: float,
    tail: float,
    points: int,
) -> list[tilted.LossTail]:
    """The composed loss at an interval and at half of it."""
    width = max(high - low for low, high in (pair.loss_ends(tail) for pair in pairs))
    return [
        tilted.compose(
            [connect_the_dots(pair, interval, tail) for pair in pairs],
            interval,
            tilt,
        )
        for interval in (width / points, width / (2 * points))
    ]
