"""Solve for ε, δ, noise multiplier, steps or sampling rate of a DP-SGD run, given the others.

Each function solves for the quantity it is named after, given the other four. What it returns is on
the safe side by the accountant asked: ε at the returned noise, steps or rate is at most the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from dptorch.accounting.accountants import registry
from dptorch.accounting.accountants.protocol import Accountant, check_delta, check_epsilon
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.composition import contour
from dptorch.accounting.events import SampledGaussian
from dptorch.accounting.pairs.reduction import directions, pair_of
from dptorch.errors import ConfigurationError, PrivacyError

__all__ = ["delta", "epsilon", "noise_multiplier", "sample_rate", "steps"]

_LEAST_NOISE, _MOST_NOISE = 1e-2, 1e7
# Below this ε the grids of `pld` grow too long: the noise is then set so that ε is 0.
_TINY_EPSILON = 1e-4
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
        accountant: one of `dptorch.accounting.accountant_names()`, or "glw".
        adjacency: the neighbouring relation, an `Adjacency` or its value.

    Raises:
        ConfigurationError: a value out of range or NaN, or an unknown name.

    Example:
        >>> round(epsilon(sample_rate=0.01, noise_multiplier=1.0, steps=1000, delta=1e-5), 2)
        1.83
    """
    event = SampledGaussian(noise_multiplier, sample_rate, steps)
    return registry.get_accountant(accountant).epsilon([event], delta, adjacency=adjacency)


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
    return registry.get_accountant(accountant).delta([event], epsilon, adjacency=adjacency)


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
        0.0 for steps=0: nothing is released. For targets below 1e-4, 0 included, where composing
        exactly takes minutes, the noise that makes ε = 0: more than is needed, and safe.

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
    if target_epsilon < _TINY_EPSILON and accountant == "pld" and sample_rate < 1:
        return _noise_for_no_epsilon(delta, sample_rate, steps, Adjacency.of(adjacency))
    return question.solve(
        lambda sigma: SampledGaussian(sigma, sample_rate, steps),
        start=1.0,
        safe_end=_MOST_NOISE,
        costly_end=_LEAST_NOISE,
        unreachable="for any noise multiplier. Take fewer steps, a lower sample_rate, or a larger "
        "delta or target_epsilon",
    )


def _noise_for_no_epsilon(
    delta: float, sample_rate: float, steps: int, adjacency: Adjacency
) -> float:
    """Noise at which the total variation of the whole run is at most delta: (0, delta)-DP.

    Two bounds, of which the better: the steps' total variations q (2 Φ(1 / (2σ)) - 1) add up; and
    their divergences do, so that by Pinsker, and KL <= χ² = q² (e^{1/σ²} - 1), the total variation is
    at most q sqrt(steps (e^{1/σ²} - 1) / 2). Replace-one is two such changes.
    """
    share = delta * (1 - 1e-9) / (sample_rate * adjacency.sensitivity_factor)
    summed = min(share / steps, 1 - 1e-12)
    from statistics import NormalDist  # loads half of the standard library's numbers

    by_sum = 1 / (2 * NormalDist().inv_cdf((1 + summed) / 2))
    by_divergence = 1 / math.sqrt(math.log1p(2 * share**2 / steps))
    return min(by_sum, by_divergence)


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
    """Whether a run stays within a target. Compares δ at the target ε, which is strictly monotone."""

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
            registry.get_accountant(accountant),
            Adjacency.of(adjacency),
        )

    def excess(self, run: SampledGaussian, accountant: Accountant | None = None) -> float:
        """log δ(target) - log delta: at most 0 within the target."""
        asked = accountant or self.accountant
        value = asked.delta([run], self.target, adjacency=self.adjacency)
        if math.isnan(value):
            raise PrivacyError(
                f"accountant {asked.name!r} returned NaN for {run}. Nothing is stated."
            )
        return math.log(max(value, 1e-300)) - math.log(self.delta)

    def moments_excess(self, run: SampledGaussian) -> float:
        """`excess` by the moments bound of one direction: cheap, and near enough to start from."""
        if run.noise_multiplier == 0:
            return math.inf
        pairs = [pair_of(run, directions(self.adjacency)[0], self.adjacency)]
        log_delta = math.log(self.delta)
        tail = contour.negligible_tail(pairs, log_delta)
        return contour.saddle(pairs, self.target, tail)[1] - log_delta

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
        exact = registry.get_accountant("exact")
        near, _ = _root(
            lambda log_x: self.moments_excess(run(math.exp(log_x))), math.log(start), 1.0, *log_ends
        )
        found, slope = _root(
            lambda log_x: self.excess(run(math.exp(log_x)), exact),
            log_ends[0] if near is None else near,
            0.05,
            *log_ends,
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

    def _settle(self, run: Callable[[float], SampledGaussian], found: float, safe: float) -> float:
        """Step towards the safe end until ε itself, not only δ, confirms the target."""
        step = 4e-9 if safe > found else -4e-9
        for _ in range(40):
            value = math.exp(found)
            if self.cost(run(value)) <= self.target:
                return value
            found, step = found + step, 2 * step
        raise ConfigurationError(
            f"target_epsilon={self.target} is too close to what accountant "
            f"{self.accountant.name!r} can resolve. Take a slightly larger one."
        )

    def most_steps(self, run: Callable[[float], SampledGaussian]) -> int:
        """The largest whole number of steps within the target; one is known to be."""
        if self.moments_excess(run(_MOST_STEPS)) <= 0 and self.affords(run(_MOST_STEPS)):
            return _MOST_STEPS
        near, _ = _root(
            lambda log_x: self.moments_excess(run(math.exp(log_x))),
            math.log(1024),
            1.0,
            0.0,
            math.log(_MOST_STEPS),
        )
        exact = registry.get_accountant("exact")
        low = _most_whole(lambda n: self.excess(run(n), exact), int(math.exp(near or 0.0)))
        if self.accountant.name != "exact":
            low = _most_whole(lambda n: self.excess(run(n)), low)
        while low > 1 and self.cost(run(low)) > self.target:
            low -= 1
        return low


def _root(
    gap: Callable[[float], float], start: float, stride: float, safe: float, costly: float
) -> tuple[float | None, float]:
    """Where the monotone `gap` crosses 0 between `safe` (gap < 0) and `costly`, and its slope.

    Returns:
        The crossing from the safe side (None where even `safe` is too costly; `costly` itself where
        that is affordable), and d gap / dx there.
    """
    from scipy.optimize import brentq

    towards = 1.0 if costly > safe else -1.0
    gap = lru_cache(maxsize=None)(gap)
    # Walk from the start in growing strides, so that extreme ends are tried only when needed.
    inside: float | None = None
    outside: float | None = None
    at = start
    while inside is None or outside is None:
        if gap(at) <= 0:
            inside = at
            if at == costly:
                return costly, towards
        else:
            outside = at
            if at == safe:
                return None, towards
        if outside is None:
            at = towards * min(towards * at + stride, towards * costly)
        elif inside is None:
            at = towards * max(towards * at - stride, towards * safe)
        stride *= 2.0
    root = float(brentq(gap, inside, outside, xtol=1e-9, rtol=1e-12))
    aside = inside if abs(inside - root) > abs(outside - root) else outside
    slope = (gap(root) - gap(aside)) / (root - aside)
    return root - 2e-9 * towards, slope


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
    at, value, stride = start, gap(start), 5e-7
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
        # Aim at the middle of the wanted interval.
        step = (-_CLOSE / 2 - value) / slope if slope * towards > 0 else math.inf
        if inside is not None and outside is not None:
            after = at + step
            ends = sorted((inside[0], outside[0]))
            if not ends[0] < after < ends[1]:
                after = (ends[0] + ends[1]) / 2
        else:
            # Without a bracket every stride is at least twice the last.
            stride = max(2 * stride, min(abs(step), 1.0))
            after = at + towards * math.copysign(stride, -value)
        after = min(max(after, low), high)
        at, value = after, gap(after)
    return inside[0] if inside is not None else None


def _most_whole(gap: Callable[[int], float], guess: int) -> int:
    """The largest whole number >= 1 with gap <= 0 (gap rises, gap(1) <= 0), searched from `guess`."""
    low, high = max(guess, 1), 0
    stride = max(1, low // 2000)
    below = gap(low) if low > 1 else -1.0
    above = math.inf
    while below > 0:
        high, above = low, below
        low, stride = max(1, low - stride), 8 * stride
        below = gap(low) if low > 1 else -1.0
    while high == 0:
        at = low + stride
        value = gap(at)
        if value <= 0:
            low, below, stride = at, value, 8 * stride
        else:
            high, above = at, value
    while high - low > 1:
        # False position, kept off the ends by an eighth of a wide bracket.
        room = max(1, (high - low) // 8 if high - low > 16 else 1)
        aim = low + (high - low) * (below / (below - above) if below < 0 else 0.5)
        at = int(min(max(aim, low + room), high - room))
        value = gap(at)
        if value <= 0:
            low, below = at, value
        else:
            high, above = at, value
    return low
