"""One question, five unknowns: ε, δ, noise multiplier, steps, sampling rate of a DP-SGD run.

Each function solves for the quantity it is named after, given the other four. What it returns is on
the safe side by the accountant asked: ε at the returned noise, steps or rate is at most the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dptorch.accounting.accountants import registry
from dptorch.accounting.accountants.protocol import Accountant, check_delta, check_epsilon
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.events import SampledGaussian
from dptorch.errors import ConfigurationError

__all__ = ["delta", "epsilon", "noise_multiplier", "sample_rate", "steps"]

_LEAST_NOISE, _MOST_NOISE = 1e-2, 1e7
_LEAST_RATE = 1e-12
_MOST_STEPS = 10**12
_CLOSE = 1e-5  # in log δ: about as far in ε, relative to ε


def epsilon(
    *,
    sample_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
) -> float:
    """The ε of `steps` DP-SGD steps at `delta`.

    Args:
        sample_rate: probability of drawing a record at each step, in (0, 1].
        noise_multiplier: standard deviation of the noise over max_grad_norm; 0 gives inf.
        steps: 0 gives 0.0.
        delta: in (0, 1).
        accountant: one of `dptorch.accounting.names()`, or "glw".
        adjacency: the neighbouring relation, an `Adjacency` or its value.

    Raises:
        ConfigurationError: a value out of range or NaN, or an unknown name.

    Example:
        >>> round(epsilon(sample_rate=0.01, noise_multiplier=1.0, steps=1000, delta=1e-5), 2)
        1.83
    """
    event = SampledGaussian(noise_multiplier, sample_rate, steps)
    return registry.get(accountant).epsilon([event], delta, adjacency=adjacency)


def delta(
    *,
    sample_rate: float,
    noise_multiplier: float,
    steps: int,
    epsilon: float,
    accountant: str = "pld",
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
) -> float:
    """The δ of `steps` DP-SGD steps at `epsilon`; arguments as in `epsilon`.

    Example:
        >>> value = delta(sample_rate=0.01, noise_multiplier=1.0, steps=1000, epsilon=1.83)
        >>> f"{value:.1e}"
        '9.9e-06'
    """
    event = SampledGaussian(noise_multiplier, sample_rate, steps)
    return registry.get(accountant).delta([event], epsilon, adjacency=adjacency)


def noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "pld",
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
) -> float:
    """The smallest noise multiplier that keeps `steps` DP-SGD steps within `target_epsilon`.

    Returns:
        0.0 for steps=0: nothing is released.

    Raises:
        ConfigurationError: a value out of range, or a target below what the accountant can show for
            any noise; the message names the smallest ε it can.

    Example:
        >>> sigma = noise_multiplier(target_epsilon=3.0, delta=1e-5, sample_rate=0.01, steps=1000)
        >>> round(sigma, 3)
        0.814
    """
    question = _Question.of(target_epsilon, delta, accountant, adjacency)
    if SampledGaussian(1.0, sample_rate, steps).steps == 0:
        return 0.0
    return question.solve(
        lambda sigma: SampledGaussian(sigma, sample_rate, steps),
        start=1.0,
        safe_end=_MOST_NOISE,
        costly_end=_LEAST_NOISE,
        unreachable="for any noise multiplier. Take fewer steps, a lower sample_rate, or a larger "
        "delta or target_epsilon",
    )


def sample_rate(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    steps: int,
    accountant: str = "pld",
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
) -> float:
    """The largest sampling rate at which `steps` DP-SGD steps stay within `target_epsilon`.

    Returns:
        1.0 where even every record at every step is within the target.

    Raises:
        ConfigurationError: a value out of range, or a target that no rate reaches; the message
            names the smallest reachable ε.

    Example:
        >>> rate = sample_rate(target_epsilon=1.8290, delta=1e-5, noise_multiplier=1.0, steps=1000)
        >>> round(rate, 4)
        0.01
    """
    question = _Question.of(target_epsilon, delta, accountant, adjacency)
    if question.affords(SampledGaussian(noise_multiplier, 1.0, steps)):
        return 1.0
    return question.solve(
        lambda rate: SampledGaussian(noise_multiplier, rate, steps),
        start=1e-2,
        safe_end=_LEAST_RATE,
        costly_end=1.0,
        unreachable="at any sample_rate. Add noise, take fewer steps, or take a larger delta or "
        "target_epsilon",
    )


def steps(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    noise_multiplier: float,
    accountant: str = "pld",
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
) -> int:
    """The largest number of DP-SGD steps that stays within `target_epsilon`.

    Raises:
        ConfigurationError: a value out of range, or a single step costs more than the target; the
            message names what it costs.

    Example:
        >>> steps(target_epsilon=1.8290, delta=1e-5, sample_rate=0.01, noise_multiplier=1.0)
        1000
    """
    question = _Question.of(target_epsilon, delta, accountant, adjacency)

    def run(count: float) -> SampledGaussian:
        return SampledGaussian(noise_multiplier, sample_rate, int(count))

    if not question.affords(run(1)):
        raise ConfigurationError(
            f"target_epsilon={target_epsilon} is unreachable: a single step costs "
            f"epsilon={question.cost(run(1)):.6g}, the smallest reachable. Add noise, lower "
            "sample_rate, or take a larger delta or target_epsilon."
        )
    return question.most_steps(run)


@dataclass(frozen=True)
class _Question:
    """Does a run stay within the target? Asked of δ at the target ε, which is strictly monotone."""

    target: float
    delta: float
    accountant: Accountant
    adjacency: Adjacency

    @classmethod
    def of(
        cls, target: float, delta: float, accountant: str, adjacency: Adjacency | str
    ) -> _Question:
        return cls(
            check_epsilon(target, name="target_epsilon"),
            check_delta(delta),
            registry.get(accountant),
            Adjacency.of(adjacency),
        )

    def excess(self, run: SampledGaussian, accountant: Accountant | None = None) -> float:
        """log δ(target) - log delta: at most 0 within the target."""
        asked = accountant or self.accountant
        value = asked.delta([run], self.target, adjacency=self.adjacency)
        return math.log(max(value, 1e-300)) - math.log(self.delta)

    def cost(self, run: SampledGaussian) -> float:
        return self.accountant.epsilon([run], self.delta, adjacency=self.adjacency)

    def affords(self, run: SampledGaussian) -> bool:
        return self.excess(run) <= 0

    def solve(
        self,
        run: Callable[[float], SampledGaussian],
        *,
        start: float,
        safe_end: float,
        costly_end: float,
        unreachable: str,
    ) -> float:
        """The costliest argument of `run` within the target, between the two ends.

        The exact accountant finds the neighbourhood; the one asked has the last word.
        """
        log_ends = (math.log(safe_end), math.log(costly_end))
        exact = registry.get("exact")
        found, slope = _root(
            lambda log_x: self.excess(run(math.exp(log_x)), exact), math.log(start), *log_ends
        )
        if self.accountant.name != "exact" and found is not None:
            found = _approach(
                lambda log_x: self.excess(run(math.exp(log_x))), found, slope, *log_ends
            )
        if found is None:
            least = self.cost(run(safe_end))
            raise ConfigurationError(
                f"target_epsilon={self.target} is unreachable: accountant "
                f"{self.accountant.name!r} shows no epsilon below {least:.6g} {unreachable}."
            )
        return self._settle(run, found, log_ends[0])

    def _settle(
        self, run: Callable[[float], SampledGaussian], found: float, safe: float
    ) -> float:
        """Step towards the safe end until ε itself, not only δ, confirms the target."""
        step = 1e-9 if safe > found else -1e-9
        for _ in range(40):
            value = math.exp(found)
            if self.cost(run(value)) <= self.target:
                return value
            found, step = found + step, 2 * step
        raise ConfigurationError(
            f"target_epsilon={self.target} is too close to what accountant "
            f"{self.accountant.name!r} can resolve; take a slightly larger one."
        )

    def most_steps(self, run: Callable[[float], SampledGaussian]) -> int:
        """The largest whole number of steps within the target; one is known to be."""
        if self.affords(run(_MOST_STEPS)) and self.cost(run(_MOST_STEPS)) <= self.target:
            return _MOST_STEPS
        exact = registry.get("exact")
        low, high = _whole_bracket(lambda count: self.excess(run(count), exact), 1, 1024)
        if self.accountant.name != "exact":
            low, high = _whole_bracket(lambda count: self.excess(run(count)), 1, max(low, 2))
        while low > 1 and self.cost(run(low)) > self.target:
            low -= 1
        return low


def _root(
    gap: Callable[[float], float], start: float, safe: float, costly: float
) -> tuple[float | None, float]:
    """Where the monotone `gap` crosses 0 between `safe` (gap < 0) and `costly`, and its slope.

    Returns:
        The crossing from the safe side (None where even `safe` is too costly; `costly` itself where
        that is affordable), and d gap / dx there.
    """
    from scipy.optimize import brentq

    towards = 1.0 if costly > safe else -1.0
    # Walk from the start in growing strides, so that extreme ends are tried only when needed.
    inside, outside, stride, at = None, None, 0.7, start
    while inside is None or outside is None:
        if gap(at) <= 0:
            inside = at
            if at == costly:
                return costly, 1.0
        else:
            outside = at
            if at == safe:
                return None, 1.0
        if inside is None:
            at = min(at + stride, safe) if towards < 0 else max(at - stride, safe)
        elif outside is None:
            at = max(at - stride, costly) if towards < 0 else min(at + stride, costly)
        stride *= 1.6
    root = float(brentq(gap, inside, outside, xtol=1e-11, rtol=1e-13))
    near = root + 1e-3 * towards
    slope = (gap(near) - gap(root)) / (near - root)
    return root - 2e-11 * towards, slope


def _approach(
    gap: Callable[[float], float], start: float, slope: float, safe: float, costly: float
) -> float | None:
    """A point with gap in [-_CLOSE, 0] by safeguarded secants from `start`; None if there is none.

    Made for a `gap` that costs much and has the nearly known `slope`: three evaluations or so.
    """
    towards = 1.0 if costly > safe else -1.0
    low, high = min(safe, costly), max(safe, costly)
    inside: tuple[float, float] | None = None
    outside: tuple[float, float] | None = None
    at, value = start, gap(start)
    for _ in range(60):
        if -_CLOSE <= value <= 0:
            return at
        if value <= 0:
            inside = (at, value)
            if at == costly:
                return at
        else:
            outside = (at, value)
            if at == safe:
                return None
        if inside is not None and outside is not None:
            if abs(outside[0] - inside[0]) < 1e-9:
                return inside[0]
            slope = (outside[1] - inside[1]) / (outside[0] - inside[0])
        # Aim at the middle of the wanted interval; without a bracket, stride on if that is short.
        target = -_CLOSE / 2
        step = (target - value) / slope if slope * towards > 0 else -math.copysign(0.1, value)
        after = at + max(min(step, 1.0), -1.0)
        if inside is not None and outside is not None:
            ends = sorted((inside[0], outside[0]))
            if not ends[0] < after < ends[1]:
                after = (ends[0] + ends[1]) / 2
        elif value > 0:
            after = at - towards * max(abs(after - at), 1e-6)
        after = min(max(after, low), high)
        at, value = after, gap(after)
    return inside[0] if inside is not None else None


def _whole_bracket(gap: Callable[[int], float], low: int, guess: int) -> tuple[int, int]:
    """Neighbouring whole numbers (n, n+1) with gap(n) <= 0 < gap(n+1); gap(low) <= 0 is known."""
    values: dict[int, float] = {}

    def at(count: int) -> float:
        if count not in values:
            values[count] = gap(count)
        return values[count]

    high = max(guess, low + 1)
    growth = 1
    while at(high) <= 0:
        low, high = high, high + max(1, (high // 1000) * growth)
        growth *= 8
    while high - low > 1:
        if low in values:
            # False position in log steps, kept off the ends by an eighth of the bracket.
            below, above = at(low), at(high)
            share = below / (below - above) if below < 0 else 0.5
            guess = round(low * (high / low) ** share)
            room = (high - low) // 8 if high - low > 64 else 0
            middle = min(max(guess, low + max(room, 1)), high - max(room, 1))
        else:
            middle = (low + high) // 2
        if at(middle) <= 0:
            low = middle
        else:
            high = middle
    return low, high
