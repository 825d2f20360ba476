"""The certified accountant: a connect-the-dots privacy loss distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from dptorch.accounting import contour, tilted
from dptorch.accounting.accountants.protocol import (
    check_delta,
    check_epsilon,
    covered,
    without_noise,
)
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.dominating import Direction, directions
from dptorch.accounting.events import Event, History, SampledGaussian

__all__ = ["PLDAccountant"]

_LONGEST_GRID = 2e-3
_LARGEST_WINDOW = 2**23


@dataclass(frozen=True)
class PLDAccountant:
    """An upper bound on ε, tight to `tolerance`: the number to state.

    Each step's privacy loss is put on a grid by Google's `dp-accounting`, which rounds it so that
    δ(ε) only grows ("connect the dots": Doroshenko et al. 2022, arXiv:2207.04380, Theorem 3.3); the
    steps are composed by tilted FFTs (`tilted`). The excess of ε grows as interval² · steps, with
    a factor of at most 1.6 over the published settings, so interval = sqrt(tolerance / (1.6 steps)).

    Guarantees:
        ε and δ are at least the true ones: discretisation, cut-off tails and a margin for the
        rounding of the FFT all err upwards. (`dp-accounting`'s own composition carries absolute
        errors of steps · 1e-16: at δ = 1e-10 and 1e5 steps its ε is off by up to 1e-2, and not
        always upwards.)

    Attributes:
        tolerance: wanted excess of ε over the exact value. Runs with a very large ε get a coarser
            grid, hence a larger excess, so that memory stays bounded.

    Example:
        >>> run = [SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)]
        >>> 1.8282367 < PLDAccountant().epsilon(run, 1e-5) < 1.8292
        True
    """

    tolerance: float = 1e-3
    name: str = "pld"
    is_upper_bound: bool = True

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
        events = tuple(covered(self, history))
        if not events:
            return 0.0
        if without_noise(events):
            return math.inf
        target = math.log(delta)
        tail = contour.negligible_tail(events, target)
        epsilon = 0.0
        for direction in directions(relation):
            # The margin covers the tail that the bound leaves out.
            bound = contour.moments_bound(events, direction, target - 1e-9, tail)[1]
            if bound <= epsilon:
                continue
            # The tilt only decides how tight the bound is, so an uncertified ε may choose it.
            near = contour.contour_epsilon(events, direction, delta, floor=epsilon)
            loss = self._loss(events, direction, near, tail)
            epsilon = max(epsilon, loss.epsilon(delta))
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
        events = tuple(covered(self, history))
        if not events:
            return 0.0
        if without_noise(events):
            return 1.0
        delta = 0.0
        for direction in directions(relation):
            near = contour.contour_delta(events, direction, epsilon, floor=delta)
            tail = contour.negligible_tail(events, math.log(max(near, 1e-300)))
            bound = contour.saddle(events, direction, epsilon, tail)[1]
            if bound < math.log(max(delta, 1e-300)) - 1e-9:
                continue
            delta = max(delta, self._loss(events, direction, epsilon, tail).delta(epsilon))
        return delta

    def _loss(
        self,
        events: tuple[SampledGaussian, ...],
        direction: Direction,
        epsilon: float,
        tail: float,
    ) -> tilted.LossTail:
        tilt, _ = contour.saddle(events, direction, epsilon, tail)
        # Rounded, so that asking for ε and then for δ at that ε composes once.
        tilt = float(f"{tilt:.2e}")
        return _composed(events, direction, self._interval(events, direction), tilt, tail)

    def _interval(self, events: tuple[SampledGaussian, ...], direction: Direction) -> float:
        steps = sum(event.steps for event in events)
        wanted = min(_LONGEST_GRID, math.sqrt(self.tolerance / (1.6 * steps)))
        mean_gap = [contour.log_mgf([event], direction, 1e-4) / 1e-4 for event in events]
        width = 30.0 * math.sqrt(2 * max(sum(mean_gap), 1e-30)) + 60.0
        return max(wanted, width / _LARGEST_WINDOW)


@lru_cache(maxsize=8)
def _composed(
    events: tuple[SampledGaussian, ...],
    direction: Direction,
    interval: float,
    tilt: float,
    tail: float,
) -> tilted.LossTail:
    parts = [tilted.connect_the_dots(event, direction, interval, tail) for event in events]
    return tilted.compose(parts, interval, tilt)
