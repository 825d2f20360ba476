"""The noise that a target ε needs, for any event."""

from __future__ import annotations

import math
from collections.abc import Callable

from dptorch.accounting.accountants import registry
from dptorch.accounting.accountants.protocol import check_delta, check_epsilon
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.events import Event, SampledGaussian
from dptorch.accounting.planning.solve import noise_multiplier
from dptorch.errors import ConfigurationError

__all__ = ["noise_multiplier_for"]

_MOST_NOISE = 1e6
_CLOSE = 2e-4  # in log ε


def noise_multiplier_for(
    event: Callable[[float], Event],
    *,
    target_epsilon: float,
    delta: float,
    accountant: str = "pld",
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
) -> float:
    """The smallest noise multiplier that keeps an event within a target, to 0.02 % of its ε.

    Args:
        event: noise multiplier -> what is released.
        target_epsilon, delta, accountant, adjacency: as for `noise_multiplier`.

    Returns:
        0.0 where nothing is released.

    Raises:
        ConfigurationError: a value out of range, or a target below what the accountant can show for
            any noise; the message names the smallest ε it can.
        PrivacyError: the accountant does not cover the event.

    Example:
        >>> from dptorch.accounting import EpochwiseGaussian
        >>> sigma = noise_multiplier_for(
        ...     lambda noise: EpochwiseGaussian(noise, steps_per_epoch=100, steps=1000),
        ...     target_epsilon=3.0, delta=1e-5)
        >>> round(sigma, 2)
        4.4
    """
    like = event(1.0)
    if isinstance(like, SampledGaussian):
        return noise_multiplier(
            target_epsilon=target_epsilon,
            delta=delta,
            sample_rate=like.sample_rate,
            steps=like.steps,
            accountant=accountant,
            adjacency=adjacency,
        )
    if check_epsilon(target_epsilon, name="target_epsilon") == 0:
        raise ConfigurationError(
            f"target_epsilon={target_epsilon!r} must be above 0, such as 3.0: at 0, what is released "
            "would not depend on the data."
        )
    check_delta(delta)
    if like.steps == 0:
        return 0.0
    asked = registry.get_accountant(accountant)

    def excess(log_noise: float) -> float:
        """log ε - log target: falls with the noise, and nearly along a line."""
        cost = asked.epsilon([event(math.exp(log_noise))], delta, adjacency=adjacency)
        return math.log(max(cost, 1e-12)) - math.log(max(target_epsilon, 1e-12))

    found = _falling_root(excess, math.log(_MOST_NOISE))
    if found is None:
        least = asked.epsilon([event(_MOST_NOISE)], delta, adjacency=adjacency)
        raise ConfigurationError(
            f"target_epsilon={target_epsilon} is unreachable: accountant {accountant!r} shows no "
            f"epsilon below {least:.6g} for any noise multiplier. Take fewer steps, smaller "
            "batches, or a larger delta or target_epsilon."
        )
    return math.exp(found)


def _falling_root(function: Callable[[float], float], most: float) -> float | None:
    """An x below `most` with function(x) in [-_CLOSE, 0], by secants within a bracket; or None.

    Made for a costly, nearly linear `function`: five evaluations or so.
    """
    above: tuple[float, float] | None = None  # x too small: value > 0
    below: tuple[float, float] | None = None
    x, slope = 0.0, -1.2
    for _ in range(100):
        value = function(x)
        if -_CLOSE <= value <= 0:
            return x
        before = below or above
        if before is not None and math.isfinite(value) and math.isfinite(before[1]):
            slope = min((value - before[1]) / (x - before[0]), -0.1)
        if value > 0:
            above = (x, value)
            if x >= most:
                return None
        else:
            below = (x, value)
        # Aim at the middle of what is accepted; without a bracket, never far.
        step = -(value + _CLOSE / 2) / slope if math.isfinite(value) else 1.0
        aim = min(x + max(-3.0, min(3.0, step)), most)
        if above is not None and below is not None:
            if not above[0] < aim < below[0]:
                aim = (above[0] + below[0]) / 2
            if below[0] - above[0] < 1e-9:
                return below[0]
        x = aim
    return below[0] if below is not None else None
