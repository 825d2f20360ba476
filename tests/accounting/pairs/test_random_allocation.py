"""Random allocation against integrals, simulation and Rényi moments computed otherwise."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import gammaln, ndtr

from dptorch import accounting
from dptorch.accounting import RandomAllocationGaussian, SampledGaussian
from dptorch.accounting.composition.contour import log_mgf
from dptorch.accounting.pairs.random_allocation import AllocationPair
from dptorch.errors import PrivacyError

PLD = accounting.get_accountant("pld")


def call(strike, sigma):
    """E[(Y - strike)_+] of the lognormal Y = e^{Z/σ - 1/(2σ²)} (Black and Scholes)."""
    if strike <= 0:
        return 1 - strike
    d = sigma * math.log(strike)
    return ndtr(0.5 / sigma - d) - strike * ndtr(-0.5 / sigma - d)


def profile_of_two(sigma, alpha):
    """E[(W - α)_+] for W = (Y1 + Y2) / 2, given Y1 in closed form."""
    inner = lambda z: (
        math.exp(-z * z / 2)
        / math.sqrt(2 * math.pi)
        * call(2 * alpha - math.exp(z / sigma - 0.5 / sigma**2), sigma)
        / 2
    )
    kink = sigma * math.log(2 * alpha) + 0.5 / sigma
    return quad(inner, -12, 12 + 2 / sigma, points=[kink], epsabs=1e-15, epsrel=1e-11, limit=400)[0]


def one_epoch(direction, sigma, epsilon, choices=2):
    return AllocationPair(direction, sigma, choices, 1).one_step_delta(epsilon)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.2, 1.0])
def test_two_steps_by_integration(sigma, epsilon):
    alpha = math.exp(epsilon)
    remove = profile_of_two(sigma, alpha)
    # (1 - αW)_+ = α (1/α - W)_+, and (c - W)_+ = (W - c)_+ + c - W
    add = alpha * (profile_of_two(sigma, 1 / alpha) + 1 / alpha - 1)
    for direction, truth in (("remove", remove), ("add", add)):
        found = one_epoch(direction, sigma, epsilon)
        # The grids err upwards; at low noise Y has a wide range and the grid of few terms shows.
        assert truth - 1e-11 <= found <= truth * (1 + (1e-3 if sigma >= 1 else 2e-2)) + 1e-10
    certified = PLD.delta([RandomAllocationGaussian(sigma, 2, 2)], epsilon)
    assert max(remove, add) <= certified <= max(remove, add) * 1.02 + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("choices", "epochs"), [(3, 1), (3, 2), (100, 10)])
def test_no_simulation_is_above_the_bound(choices, epochs):
    """60,000 runs of each direction: δ(ε) lies within 4.5 standard errors (false alarm 1e-5)."""
    rng = np.random.default_rng(7)
    sigma, n = 1.0, 60_000
    for direction in ("remove", "add"):
        losses = np.zeros(n)
        for _ in range(epochs):
            parts = []
            for _ in range(10 if choices > 10 else 1):
                size = n // 10 if choices > 10 else n
                x = sigma * rng.standard_normal((size, choices), dtype=np.float32)
                if direction == "remove":
                    x[:, 0] += 1  # by symmetry, always the first step
                w = np.exp(x / sigma**2 - 0.5 / sigma**2).mean(axis=1, dtype=np.float64)
                parts.append(np.log(w) if direction == "remove" else -np.log(w))
            losses += np.concatenate(parts)
        for epsilon in (0.0, 0.5):
            gains = np.maximum(-np.expm1(epsilon - losses), 0)
            pair = AllocationPair(direction, sigma, choices, epochs)
            bound = PLD._delta([(pair,)], epsilon)
            error = 4.5 * gains.std() / math.sqrt(n)
            assert gains.mean() - error <= bound <= gains.mean() + error + 2e-3


def log_moment(sigma, choices, order):
    """log E_Q[W^order] for a whole order: order! times a coefficient of (Σ E[Y^k] x^k / k!)^t."""
    k = np.arange(order + 1)
    series = np.exp(k * (k - 1) / (2 * sigma**2) - gammaln(k + 1))
    power = np.zeros(order + 1)
    power[0] = 1.0
    for _ in range(choices):
        power = np.convolve(power, series)[: order + 1]
    return math.log(power[order]) + gammaln(order + 1) - order * math.log(choices)


@pytest.mark.parametrize(
    ("sigma", "choices", "order"), [(1.0, 3, 2), (1.0, 100, 4), (2.0, 1000, 2), (2.0, 10, 8)]
)
def test_renyi_moments_of_remove(sigma, choices, order):
    """K(λ - 1) = log E_Q[W^λ]; the grid's is a little larger, never smaller."""
    truth = log_moment(sigma, choices, order)
    found = log_mgf([AllocationPair("remove", sigma, choices, 1)], order - 1.0)
    assert truth * (1 - 1e-6) <= found <= truth * 1.002 + 1e-7


@pytest.mark.parametrize(("sigma", "choices"), [(1.0, 3), (1.0, 100)])
@pytest.mark.parametrize("order", [1.0, 3.0])
def test_renyi_moments_of_add(sigma, choices, order):
    """E_Q[W^-β] = t^β / Γ(β) ∫ s^{β-1} E[e^{-sY}]^t ds, by the Laplace transform of a lognormal."""
    z, weights = np.polynomial.hermite_e.hermegauss(150)
    y = np.exp(z / sigma - 0.5 / sigma**2)
    weights = weights / math.sqrt(2 * math.pi)
    laplace = lambda s: float(weights @ np.exp(-s * y))
    inner = lambda u: math.exp(order * u) * laplace(math.exp(u)) ** choices
    integral = quad(inner, -40, 25, epsrel=1e-10, limit=600)[0]
    truth = order * math.log(choices) + math.log(integral) - math.lgamma(order)
    found = log_mgf([AllocationPair("add", sigma, choices, 1)], order)
    assert found == pytest.approx(truth, rel=3e-3)


@pytest.mark.slow
def test_the_published_settings():
    """1 of 100, 10 epochs: at most 1.7290 and 0.6174, the numbers of an independent (looser) code."""
    for sigma, other in ((1.0, 1.7290), (2.0, 0.6174)):
        found = PLD.epsilon([RandomAllocationGaussian(sigma, 100, 1000)], 1e-5)
        poisson = PLD.epsilon([SampledGaussian(sigma, 0.01, 1000)], 1e-5)
        assert 0.9 * other < found <= other < poisson


@pytest.mark.slow
def test_more_choices_hide_more_and_parts_of_epochs_count_whole():
    cost = lambda *run: PLD.epsilon([RandomAllocationGaussian(1.0, *run)], 1e-4)
    assert cost(10, 20) == cost(10, 11) > cost(20, 40) > cost(40, 80)
    assert cost(10, 10) < cost(10, 20)
    one = PLD.epsilon([RandomAllocationGaussian(2.0, 1, 4)], 1e-4)
    assert one == pytest.approx(PLD.epsilon([SampledGaussian(2.0, 1.0, 4)], 1e-4), abs=1e-3)


@pytest.mark.slow
def test_several_selections():
    """2 of 4 steps, all outputs in the open: simulation stays below the block bound."""
    rng = np.random.default_rng(3)
    n, sigma = 200_000, 1.0
    x = rng.standard_normal((n, 4))
    x[:, :2] += 1
    y = np.exp(x / sigma**2 - 0.5 / sigma**2)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    losses = np.log(np.mean([y[:, i] * y[:, j] for i, j in pairs], axis=0))
    gains = np.maximum(-np.expm1(0.5 - losses), 0)
    bound = PLD.delta([RandomAllocationGaussian(sigma, 4, 4, selections=2)], 0.5)
    assert gains.mean() - 4.5 * gains.std() / math.sqrt(n) <= bound <= 1.3 * gains.mean()


def test_too_little_of_a_step_would_be_caught():
    """Negative control: pretending one more choice than there is falls below the integral."""
    truth = profile_of_two(1.0, math.exp(0.2))
    assert one_epoch("remove", 1.0, 0.2, choices=3) < 0.95 * truth


def test_what_is_not_covered_says_so():
    event = RandomAllocationGaussian(1.0, 10, 10)
    with pytest.raises(PrivacyError, match="These do: pld"):
        accounting.get_accountant("exact").epsilon([event], 1e-5)
    with pytest.raises(PrivacyError, match="zero-out"):
        PLD.epsilon([event], 1e-5, adjacency="replace-one")


@pytest.mark.slow
def test_it_composes_with_poisson_sampling():
    history = [RandomAllocationGaussian(1.0, 10, 10), SampledGaussian(1.0, 0.05, 50)]
    parts = [PLD.epsilon([event], 1e-5) for event in history]
    assert max(parts) < PLD.epsilon(history, 1e-5) < sum(parts)
