"""The exact accountant: the composed privacy loss inverted along a saddle-point line."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dptorch.accounting.accountants.protocol import (
    check_delta,
    check_epsilon,
    covered,
    without_noise,
)
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.composition import composed_delta, composed_epsilon
from dptorch.accounting.dominating import directions
from dptorch.accounting.events import Event, History, SampledGaussian

__all__ = ["ExactAccountant"]


@dataclass(frozen=True)
class ExactAccountant:
    """ε and δ to about nine digits in milliseconds: for planning and calibration.

    One step and sample_rate = 1 have closed forms (`dominating`); nearly everything else, mixtures
    included, is a contour integral (`contour`; `composition` chooses). Each direction of add/remove
    is composed alone.

    `is_upper_bound` is False: the quadrature's error is checked at run time and far below 1e-6 in ε,
    but no theorem certifies its sign. State the number of "pld" where a bound is needed.

    Example:
        >>> run = [SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)]
        >>> round(ExactAccountant().epsilon(run, 1e-5), 7)
        1.8282367
        >>> round(ExactAccountant().epsilon(run, 1e-5, adjacency="replace-one"), 4)
        2.8434
    """

    name: str = "exact"
    is_upper_bound: bool = False

    def covers(self, event: Event) -> bool:
        """Whether `event` is a Poisson-sampled Gaussian."""
        return isinstance(event, SampledGaussian)

    def epsilon(
        self,
        history: History,
        delta: float,
        *,
        adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    ) -> float:
        """ε of `history` at `delta`; see `Accountant.epsilon`."""
        delta, relation = check_delta(delta), Adjacency.of(adjacency)
        events = covered(self, history)
        if not events:
            return 0.0
        if without_noise(events):
            return math.inf
        epsilon = 0.0
        for direction in directions(relation):
            epsilon = composed_epsilon(events, direction, delta, floor=epsilon)
        return epsilon

    def delta(
        self,
        history: History,
        epsilon: float,
        *,
        adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    ) -> float:
        """δ of `history` at `epsilon`; see `Accountant.delta`."""
        epsilon, relation = check_epsilon(epsilon), Adjacency.of(adjacency)
        events = covered(self, history)
        if not events:
            return 0.0
        if without_noise(events):
            return 1.0
        delta = 0.0
        for direction in directions(relation):
            delta = composed_delta(events, direction, epsilon, floor=delta)
        return delta
