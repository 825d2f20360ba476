"""The noise that a target ε needs, for any event."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from dptorch.accounting.accountants import registry
from dptorch.accounting.accountants.protocol import check_delta, check_epsilon
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.events import Event, SampledGaussian
from dptorch.accounting.solve import noise_multiplier
from dptorch.errors import ConfigurationError

__all__ = ["noise_multiplier_for"]

_MOST_NOISE = 1e6
_CLOSE = 1e-4  # in log σ


def noise_multiplier_for(
    event: Callable[[float], Event],
    *,
    target_epsilon: float,
    delta: float,
    accountant: str = "pld",
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
) -> float:
    """The smallest noise multiplier (to 0.02 %, on the safe side) that keeps an event within a target.

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
        4.46
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
    check_epsilon(target_epsilon, name="target_epsilon")
    check_delta(delta)
    if like.steps == 0:
        return 0.0
    asked = registry.get(accountant)

    @cache
    def excess(log_noise: float) -> float:
        """log ε - log target, which falls almost linearly."""
        cost = asked.epsilon([event(math.exp(log_noise))], delta, adjacency=adjacency)
        if math.isinf(cost):
            return 50.0
        return math.log(max(cost, 1e-12)) - math.log(max(target_epsilon, 1e-12))

    from scipy.optimize import brentq

    low = high = 0.0
    while excess(high) > 0:
        if high >= math.log(_MOST_NOISE):
            least = asked.epsilon([event(_MOST_NOISE)], delta, adjacency=adjacency)
            raise ConfigurationError(
                f"target_epsilon={target_epsilon} is unreachable: accountant {accountant!r} shows no "
                f"epsilon below {least:.6g} for any noise multiplier. Take fewer steps, smaller "
                "batches, or a larger delta or target_epsilon."
            )
        low, high = high, high + 1.0
    while excess(low) <= 0:
        low, high = low - 1.0, low
    found = float(brentq(excess, low, high, xtol=_CLOSE))
    while excess(found) > 0:
        found += _CLOSE
    return math.exp(found)
