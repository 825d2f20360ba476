"""The adaptive count holds against someone who chooses each step after looking at the last."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from dptorch.accounting import Adjacency, Event, RandomAllocationGaussian, SampledGaussian
from dptorch.ledger.budget import adaptive_epsilon, planned_epsilon

RUNS = 40_000
DELTA = 0.02  # large, so that a simulation can see it
STANDARD_ERROR = (DELTA / RUNS) ** 0.5  # at most, since (1 - e^(ε - L))+ lies in [0, 1]


def delta_of_an_adversary(
    cap: float, count: Callable[[list[Event], float], float], sigmas: tuple[float, ...] = (1.5, 6.0)
) -> float:
    """δ at ε = `cap` of Gaussian releases that an adversary chooses and a filter lets through.

    He releases with the smallest noise while the privacy loss is small and with the largest once it is
    half of what he wants, until the filter stops him: the next release would make `count` exceed
    `cap`. δ(ε) = E[(1 - e^(ε - L))+] over RUNS simulations.
    """
    rng = np.random.default_rng(0)
    loss = np.zeros(RUNS)
    used = np.zeros((RUNS, len(sigmas)), int)
    done = np.zeros(RUNS, bool)
    allowed: dict[tuple[int, ...], bool] = {}

    def fits(row: np.ndarray) -> bool:
        key = tuple(int(n) for n in row)
        if key not in allowed:
            events = [SampledGaussian(s, 1.0, n) for s, n in zip(sigmas, key, strict=True) if n]
            allowed[key] = count(events, DELTA) <= cap
        return allowed[key]

    while not done.all():
        choice = np.where(loss < cap / 2, 0, len(sigmas) - 1)
        wanted = used.copy()
        wanted[np.arange(RUNS), choice] += 1
        kinds, which = np.unique(wanted, axis=0, return_inverse=True)
        ok = np.array([fits(row) for row in kinds])[which.ravel()] & ~done
        done |= ~ok
        done |= loss > 1.2 * cap  # he has what he wanted
        go = ok & ~done
        used[go] = wanted[go]
        mu = 1 / np.array(sigmas)[choice]
        loss[go] += (mu * rng.standard_normal(RUNS) + mu**2 / 2)[go]
    return float(np.maximum(0, -np.expm1(cap - loss)).mean())


@pytest.mark.slow
def test_an_adaptive_adversary_stays_below_the_cap() -> None:
    """With 5 standard errors of slack; a false alarm is as likely as 3e-7."""
    assert 0 < delta_of_an_adversary(3.0, adaptive_epsilon) < DELTA + 5 * STANDARD_ERROR


@pytest.mark.slow
def test_a_filter_without_the_surcharge_is_caught() -> None:
    """Negative control: one that compares expected losses with the cap."""

    def expected_loss(history: list[Event], delta: float) -> float:
        return sum(e.steps / (2 * e.noise_multiplier**2) for e in history)  # type: ignore[attr-defined]

    assert delta_of_an_adversary(1.0, expected_loss, (1.5, 3.0)) > DELTA + 5 * STANDARD_ERROR


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_adaptive_is_above_planned_and_grows(adjacency: Adjacency) -> None:
    previous = 0.0
    for steps in (1, 10, 100, 1000):
        history = [SampledGaussian(1.5, 0.02, steps)]
        adaptive = adaptive_epsilon(history, 1e-5, adjacency)
        assert adaptive > planned_epsilon(history, 1e-5, adjacency)
        assert adaptive > previous
        previous = adaptive


def test_the_conversion_against_its_formula() -> None:
    """A Gaussian without sampling has ρ(α) = α / 2σ²."""
    from dptorch.ledger.budget import _ORDERS

    sigma, steps, delta = 4.0, 10, 1e-6
    expected = min(
        steps * a / (2 * sigma**2)
        + math.log(1 - 1 / a)
        + (math.log(len(_ORDERS) / delta) - math.log(a)) / (a - 1)
        for a in _ORDERS
    )
    found = adaptive_epsilon([SampledGaussian(sigma, 1.0, steps)], delta)
    assert found == pytest.approx(expected, rel=1e-9)


def test_nothing_released_costs_nothing_and_no_bound_is_infinite() -> None:
    assert adaptive_epsilon([], 1e-5) == planned_epsilon([], 1e-5) == 0.0
    assert adaptive_epsilon([SampledGaussian(0.0, 0.1, 1)], 1e-5) == math.inf
    no_rule = RandomAllocationGaussian(1.0, steps_per_epoch=10, steps=10, selections=3)
    assert adaptive_epsilon([no_rule], 1e-5, Adjacency.REPLACE_ONE) == math.inf
