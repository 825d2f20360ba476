"""The privacy loss of a pair on a grid, as an upper bound: connect the dots."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dptorch.accounting.pairs.sampled import Array, Pair

__all__ = ["Discretised", "connect_the_dots"]


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


def connect_the_dots(
    pair: Pair, interval: float, tail: float = -80.0, reach: float = math.inf
) -> Discretised:
    """Put the loss of one step on the grid of multiples of `interval` so that δ(ε) only grows.

    δ is convex in e^ε; the discrete loss's δ is its linear interpolation through the grid points,
    hence above it (Doroshenko et al. 2022, arXiv:2207.04380, section 3). What lies between two grid
    points is split between them so that its mass under P and under Q is kept. Above the grid the
    next point is an infinite loss; what lies below it moves up to the first point.

    Args:
        pair: one or more equal steps.
        interval: distance of the grid's points.
        tail: the grid leaves out e^tail of P's mass at either end.
        reach: and losses beyond ± `reach`. Each such loss keeps its part in every δ(ε) with
            ε < `reach`, so a `reach` of several ε makes the grid shorter and hardly looser.

    Guarantees:
        The composed result's δ(ε) is at least that of `pair`, at every ε.
        Held by `test_one_step_masses_are_googles` and `test_optimistic_rounding_would_be_caught`.

    Example:
        >>> from dptorch.accounting.pairs.sampled import SampledPair
        >>> part = connect_the_dots(SampledPair("remove", 1.0, 0.01, steps=5), 1e-3)
        >>> bool(abs(part.masses.sum() + part.infinite - 1) < 1e-12)
        True
    """
    first, p, q = pair.cells(interval, tail, reach)
    grid = interval * np.arange(first, first + p.size)
    with np.errstate(over="ignore", invalid="ignore"):
        excess = np.nan_to_num(p - np.exp(grid) * q, nan=np.inf, posinf=np.inf)
    risen = np.clip(excess / -math.expm1(-interval), 0.0, p)
    infinite = float(np.clip(excess[-1], 0.0, p[-1]))
    masses = p - risen
    masses[-1] = p[-1] - infinite
    masses[1:] += risen[:-1]
    return Discretised(masses, first, infinite, pair.steps)
