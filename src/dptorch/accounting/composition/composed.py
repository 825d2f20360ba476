"""δ(ε) and ε(δ) of a composition in one direction, by whichever method is accurate there.

* sample_rate 1 throughout: the Gaussian's closed form;
* one step: the closed form of amplification by sampling;
* otherwise the contour integral;
* where that does not settle (few steps at a tiny rate: nearly all of the loss sits at one point),
  the discretised loss at three grid intervals, extrapolated to interval 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dptorch.accounting.composition import contour, tilted
from dptorch.accounting.pairs.discretised import connect_the_dots
from dptorch.accounting.pairs.sampled import (
    Pair,
    falling_root,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
)

__all__ = ["composed_delta", "composed_epsilon", "loss_reach"]

# Points on one side of the coarsest grid, and how close (in log δ) the grids have to agree.
_GRIDS = ((2**14, 1e-5), (2**16, 1e-4), (2**17, 1e-3))
# Losses further out than this many times (ε + the composed loss's size) count as far out.
_REACH = 8.0


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
    tail = contour.negligible_tail(pairs, -80.0)  # δ is not known yet: for one of e^-80
    tilt, _ = contour.saddle(pairs, epsilon, tail)
    for points, enough in _GRIDS:
        losses = list(_composed(pairs, epsilon, tilt, tail, points))
        if losses[-1].delta(epsilon) <= 0:
            return 0.0
        if _disagreement(losses, epsilon) < enough:
            return _limit(*(loss.delta(epsilon) for loss in losses[1:]))
    raise _unresolved(pairs)


def _extrapolated_epsilon(pairs: Sequence[Pair], delta: float) -> float:
    tail = contour.negligible_tail(pairs, math.log(delta))
    # Where one step's loss sits at one point, a single large loss makes up most of δ.
    epsilon = falling_root(
        lambda e: sum(pair.steps * pair.one_step_delta(e) for pair in pairs), delta, 1.0
    )
    for points, enough in _GRIDS:
        for _ in range(12):
            tilt, _ = contour.saddle(pairs, epsilon, tail)
            losses = list(_composed(pairs, epsilon, tilt, tail, points))
            found = _limit(*(loss.epsilon(delta) for loss in losses[1:]))
            previous, epsilon = epsilon, max(found, 0.0)
            # A tilt, and a reach, for a nearby ε are as good.
            if abs(epsilon - previous) <= 0.05 * epsilon:
                break
        if epsilon == 0 or _disagreement(losses, epsilon) < enough:
            return epsilon
    raise _unresolved(pairs)


def _disagreement(losses: Sequence[tilted.LossTail], epsilon: float) -> float:
    """What two reaches, or two grids after extrapolation, may differ by in log δ."""
    # Extrapolation is taken to leave a tenth of what the last halving changed.
    far, coarse, middle, fine = (max(loss.delta(epsilon), 1e-300) for loss in losses)
    return max(abs(math.log(far / coarse)), abs(math.log(middle / fine)) / 10)


def _limit(coarse: float, middle: float, fine: float) -> float:
    """Extrapolate a value at three intervals, each half of the last, to interval 0.

    The order is measured (Aitken): the error falls with interval² where the grid resolves one
    step's loss, and with less where most of it lies between two points.
    """
    # Ratios from 0.75 on say that no order shows yet, and would magnify rounding.
    first, second = coarse - middle, middle - fine
    ratio = second / first if first > 0 else 0.0
    return fine - second * ratio / (1 - ratio) if 0 < ratio < 0.75 else fine


def _unresolved(pairs: Sequence[Pair]) -> contour.Unsettled:
    return contour.Unsettled(
        f"no method resolves {list(pairs)} at this epsilon and delta. Use accountant='rdp'."
    )


def _composed(
    pairs: Sequence[Pair], epsilon: float, tilt: float, tail: float, points: int
) -> Iterator[tilted.LossTail]:
    """The composed loss with twice the reach at an interval; then at it, its half and its quarter.

    One step's largest losses lie far above an ε of 1e-4, and a grid over all of them would have no
    point below ε. What is far out keeps its part in δ whether or not its place is known.
    """
    reach = loss_reach(pairs, epsilon)
    for wide, fineness in ((2, 1), (1, 1), (1, 2), (1, 4)):
        interval = reach / (points * fineness)
        parts = [connect_the_dots(pair, interval, tail, wide * reach) for pair in pairs]
        # An estimate needs no margin for rounding, which would be most of a δ near 1e-13.
        yield replace(tilted.compose(parts, interval, tilt), slack=0.0)


def loss_reach(pairs: Sequence[Pair], epsilon: float) -> float:
    """Return how far from 0 a step's loss has to be resolved, for δ(ε) near this ε.

    A loss far above ε and above the sum of the others counts in full wherever it lies.
    """
    mean = variance = 0.0
    for pair in pairs:
        if pair.mu is not None:
            mean += pair.steps * pair.mu**2 / 2
            variance += pair.steps * pair.mu**2
            continue
        log_masses, losses = pair.nodes(0.0, 1.0, None)
        masses = np.exp(log_masses)
        mean += pair.steps * float(masses @ losses)
        variance += pair.steps * float(masses @ losses**2)
    return _REACH * (epsilon + abs(mean) + math.sqrt(variance))
