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

from dptorch.accounting import contour, tilted
from dptorch.accounting.dominating import (
    Direction,
    falling_root,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    largest_loss,
    one_step_delta,
)
from dptorch.accounting.events import SampledGaussian

__all__ = ["composed_delta", "composed_epsilon"]

# Points on the range of one step's loss, and the difference (in log δ) between a grid and the one
# twice as fine that is good enough: extrapolation leaves about 1/50 of it.
_GRIDS = ((2**15, 1e-4), (2**18, 1e-3))


def composed_delta(
    events: Sequence[SampledGaussian], direction: Direction, epsilon: float, floor: float = 0.0
) -> float:
    """δ(ε) of `events` (grouped, with noise), or `floor` where that is larger.

    Example:
        >>> event = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
        >>> f"{composed_delta([event], 'remove', 1.8282367):.4e}"
        '1.0000e-05'
    """
    if all(event.sample_rate == 1 for event in events):
        return max(floor, gaussian_delta(epsilon, gaussian_mu(events, direction)))
    if sum(event.steps for event in events) == 1:
        return max(floor, one_step_delta(events[0], epsilon, direction))
    try:
        return contour.contour_delta(events, direction, epsilon, floor)
    except contour.Unsettled:
        return max(floor, _extrapolated_delta(events, direction, epsilon))


def composed_epsilon(
    events: Sequence[SampledGaussian], direction: Direction, delta: float, floor: float = 0.0
) -> float:
    """The ε at which δ(ε) is `delta`, or `floor` where that is larger.

    Example:
        >>> event = SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
        >>> round(composed_epsilon([event], "remove", 1e-5), 7)
        1.8282367
    """
    if all(event.sample_rate == 1 for event in events):
        return max(floor, gaussian_epsilon(delta, gaussian_mu(events, direction)))
    if sum(event.steps for event in events) == 1:
        if one_step_delta(events[0], floor, direction) <= delta:
            return floor
        return falling_root(lambda e: one_step_delta(events[0], e, direction), delta, floor + 1.0)
    # Total variation adds up: δ(0) is at most the sum of the steps'.
    if sum(e.steps * one_step_delta(e, 0.0, direction) for e in events) <= delta:
        return floor
    try:
        return contour.contour_epsilon(events, direction, delta, floor)
    except contour.Unsettled:
        return max(floor, _extrapolated_epsilon(events, direction, delta))


def _extrapolated_delta(
    events: Sequence[SampledGaussian], direction: Direction, epsilon: float
) -> float:
    if epsilon >= largest_loss(events, direction):
        return 0.0
    tail = contour.negligible_tail(events, -80.0)
    tilt, _ = contour.saddle(events, direction, epsilon, tail)
    for points, enough in _GRIDS:
        grids = _two_grids(events, direction, tilt, tail, points)
        coarse, fine = (loss.delta(epsilon) for loss in grids)
        if fine <= 0:
            return 0.0
        if abs(math.log(coarse / fine)) < enough:
            return fine * (fine / coarse) ** (1 / 3)
    raise _unresolved(events)


def _extrapolated_epsilon(
    events: Sequence[SampledGaussian], direction: Direction, delta: float
) -> float:
    target = math.log(delta)
    tail = contour.negligible_tail(events, target)
    tilt, epsilon = contour.moments_bound(events, direction, target, tail)
    for points, enough in _GRIDS:
        for _ in range(6):
            grids = _two_grids(events, direction, tilt, tail, points)
            coarse, fine = (loss.epsilon(delta) for loss in grids)
            previous, epsilon = epsilon, max(fine - (coarse - fine) / 3, 0.0)
            # A tilt for a nearby ε is as good: the slack of `tilted` is then far below δ.
            if abs(epsilon - previous) <= 0.05 * epsilon:
                break
            tilt, _ = contour.saddle(events, direction, epsilon, tail)
        if tilt * (coarse - fine) < enough:
            return epsilon
    raise _unresolved(events)


def _unresolved(events: Sequence[SampledGaussian]) -> contour.Unsettled:
    return contour.Unsettled(
        f"no method resolves {list(events)} at this epsilon and delta. Use accountant='rdp'."
    )


def _two_grids(
    events: Sequence[SampledGaussian],
    direction: Direction,
    tilt: float,
    tail: float,
    points: int,
) -> list[tilted.LossTail]:
    """The composed loss at an interval and at half of it."""
    width = max(tilted.loss_range(event, direction, tail) for event in events)
    return [
        tilted.compose(
            [tilted.connect_the_dots(event, direction, interval, tail) for event in events],
            interval,
            tilt,
        )
        for interval in (width / points, width / (2 * points))
    ]
