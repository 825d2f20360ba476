"""The numerics against multi-precision integrals, closed forms, brute force and Google's library."""

import itertools
import math

import mpmath as mp
import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.stats import norm

from dptorch.accounting import Adjacency, SampledGaussian
from dptorch.accounting.composition import contour, tilted
from dptorch.accounting.composition.composed import composed_delta, composed_epsilon
from dptorch.accounting.pairs import sampled as dominating
from dptorch.accounting.pairs.discretised import Discretised, connect_the_dots
from dptorch.accounting.pairs.reduction import directions
from dptorch.accounting.pairs.sampled import SampledPair

DIRECTIONS = ["remove", "add", "replace"]


class Pair:
    """A dominating pair written down once more, in multi-precision and from its definition."""

    def __init__(self, sigma, rate, direction):
        self.sigma, self.rate, self.direction = mp.mpf(sigma), mp.mpf(rate), direction

    def mixture(self, shift):
        def density(x):
            centre = mp.npdf(x, 0, self.sigma)
            return (1 - self.rate) * centre + self.rate * mp.npdf(x, shift, self.sigma)

        return density

    def mixture_cdf(self, shift, x):
        centre, moved = (mp.ncdf((x - m) / self.sigma) for m in (0, shift))
        return (1 - self.rate) * centre + self.rate * moved

    @property
    def densities(self):
        centre = lambda x: mp.npdf(x, 0, self.sigma)
        return {
            "remove": (self.mixture(1), centre),
            "add": (centre, self.mixture(1)),
            "replace": (self.mixture(1), self.mixture(-1)),
        }[self.direction]

    def loss(self, x):
        p, q = self.densities
        return mp.log(p(x)) - mp.log(q(x))

    def one_step(self, epsilon):
        """δ(ε) for any real ε: the loss is monotone in x, so a half-line is the worst set."""
        low, high = mp.mpf(-60), mp.mpf(60)
        rising = self.direction != "add"
        above = lambda x: (self.loss(x) > epsilon) == rising
        if above(low) == above(high):
            everywhere = above(high) == rising
            return max(mp.mpf(0), 1 - mp.e**epsilon) if everywhere else mp.mpf(0)
        for _ in range(70):
            middle = (low + high) / 2
            low, high = (low, middle) if above(middle) else (middle, high)
        shift = {"remove": (1, 0), "add": (0, 1), "replace": (1, -1)}[self.direction]
        p, q = (self.mixture_cdf(m, high) for m in shift)
        return (1 - p) - mp.e**epsilon * (1 - q) if rising else p - mp.e**epsilon * q


def two_steps(sigma, rate, direction, epsilon):
    """δ of two steps from the definition: ∫ P(x) δ₁(ε - L(x)) dx, δ₁ by bisection for the set."""
    x = np.linspace(-13 * sigma, 1 + 13 * sigma, 20_001)
    shifts = {"remove": (1, 0), "add": (0, 1), "replace": (1, -1)}[direction]

    def density(shift, x):
        return (1 - rate) * norm.pdf(x, 0, sigma) + rate * norm.pdf(x, shift, sigma)

    def loss(x):
        return np.log(density(shifts[0], x)) - np.log(density(shifts[1], x))

    def above(shift, x):
        return (1 - rate) * norm.sf(x, 0, sigma) + rate * norm.sf(x, shift, sigma)

    sign = -1 if direction == "add" else 1
    wanted = epsilon - loss(x)
    low, high = np.full_like(x, -25.0 * sigma), np.full_like(x, 25.0 * sigma)
    for _ in range(60):
        middle = (low + high) / 2
        right = sign * (loss(middle) - wanted) < 0
        low, high = np.where(right, middle, low), np.where(right, high, middle)
    p, q = (above(shift, high) for shift in shifts)
    if direction == "add":
        p, q = 1 - p, 1 - q
    inner = np.maximum(p - np.exp(wanted) * q, 0)
    return float(trapezoid(density(shifts[0], x) * inner, x))


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("sigma", "rate", "epsilon"), [(1.0, 0.2, 0.4), (0.8, 0.01, 0.5)])
def test_two_steps_by_integration(direction, sigma, rate, epsilon):
    epsilon = 0.01 if (direction, rate) == ("add", 0.01) else epsilon
    truth = two_steps(sigma, rate, direction, epsilon)
    found = composed_delta([SampledPair(direction, sigma, rate, 2)], epsilon)
    assert found == pytest.approx(truth, rel=1e-6)
    for other in set(DIRECTIONS) - {direction}:
        wrong = composed_delta([SampledPair(other, sigma, rate, 2)], epsilon)
        assert wrong != pytest.approx(truth, rel=1e-2), "negative control: a wrong direction"


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("order", [1.5, 7.3])
@pytest.mark.parametrize(("sigma", "rate"), [(0.6, 0.3), (4.0, 0.999)])
def test_log_mgf_by_multi_precision_integration(direction, order, sigma, rate):
    with mp.workdps(20):
        pair = Pair(sigma, rate, direction)
        p, q = pair.densities
        inner = lambda x: p(x) ** mp.mpf(order) * q(x) ** (1 - mp.mpf(order))
        reach = 2 * order + 9 * sigma
        truth = float(mp.log(mp.quad(inner, mp.linspace(-reach, reach, 30), maxdegree=4)))
    found = contour.log_mgf([SampledPair(direction, sigma, rate, 1)], order - 1)
    assert found == pytest.approx(truth, rel=1e-8, abs=1e-13)


@pytest.mark.parametrize("order", [2, 3, 32, 1024])
@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 1e-5), (0.6, 0.3), (4.0, 0.999)])
def test_log_mgf_by_the_binomial_sum(order, sigma, rate):
    """E_Q[(P/Q)^λ] of `remove` for whole λ, exactly (Mironov, Talwar, Zhang 2019, section 3.3)."""
    with mp.workdps(60):
        q, variance = mp.mpf(rate), mp.mpf(sigma) ** 2
        binomial, terms = (1 - q) ** order, []
        for k in range(order + 1):
            terms.append(binomial * mp.e ** (k * (k - 1) / variance / 2))
            binomial *= (order - k) * q / ((k + 1) * (1 - q))
        truth = float(mp.log(mp.fsum(terms)))
    found = contour.log_mgf([SampledPair("remove", sigma, rate, 1)], order - 1.0)
    assert found == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0])
def test_one_step_closed_form_against_the_definition(direction, epsilon):
    for sigma, rate in [(1.0, 0.3), (0.5, 0.9), (3.0, 0.05)]:
        truth = float(Pair(sigma, rate, direction).one_step(epsilon))
        found = SampledPair(direction, sigma, rate, 1).one_step_delta(epsilon)
        assert found == pytest.approx(truth, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_contour_meets_the_closed_forms(direction):
    """The contour code has no special case of its own for one step or for sample_rate 1."""
    step = SampledPair(direction, 1.0, 0.2, 1)
    assert contour.contour_delta([step], 0.1) == pytest.approx(step.one_step_delta(0.1), rel=1e-6)
    gaussians = [SampledPair(direction, 10.0, 1.0, 60), SampledPair(direction, 5.0, 1.0, 10)]
    mu = dominating.gaussian_mu(gaussians)
    for delta in (1e-2, 1e-8, 1e-30):
        truth = dominating.gaussian_epsilon(delta, mu)
        assert contour.contour_epsilon(gaussians, delta) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("mu", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 30.0])
def test_gaussian_delta_by_multi_precision(mu, epsilon):
    with mp.workdps(60):
        m, e = mp.mpf(mu), mp.mpf(epsilon)
        truth = mp.ncdf(m / 2 - e / m) - mp.e**e * mp.ncdf(-m / 2 - e / m)
    expected = float(truth) if truth > mp.mpf("1e-290") else 0.0
    assert dominating.gaussian_delta(epsilon, mu) == pytest.approx(expected, rel=1e-9, abs=1e-290)


@pytest.mark.slow
@pytest.mark.parametrize("tilt", [0.3, 1.0, 4.0])
def test_tilted_composition_by_brute_force(tilt):
    rng = np.random.default_rng(0)
    masses = rng.dirichlet(np.ones(5)) * 0.99
    part = Discretised(masses, lowest=-2, infinite=0.01, steps=6)
    loss = tilted.compose([part], interval=0.25, tilt=tilt)
    for epsilon in (0.0, 0.7, 2.0):
        truth = 1 - 0.99**6
        for picks in itertools.product(range(5), repeat=6):
            total = 0.25 * (sum(picks) - 12)
            truth += math.prod(masses[list(picks)]) * max(0.0, 1 - math.exp(epsilon - total))
        assert loss.delta(epsilon) >= truth * (1 - 1e-12)
        assert loss.delta(epsilon) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_step_masses_are_googles(direction):
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    if direction == "replace":
        relation = NeighboringRelation.REPLACE_ONE
    google = privacy_loss_distribution.from_gaussian_mechanism(
        1.0,
        value_discretization_interval=1e-2,
        sampling_prob=0.1,
        neighboring_relation=relation,
    )
    ours = connect_the_dots(SampledPair(direction, 1.0, 0.1, 1), 1e-2)
    loss = tilted.compose([ours], 1e-2, 1.0)
    for epsilon in (0.0, 0.055, 0.07, 0.5, 3.0):
        pmf = google._pmf_add if direction == "add" else google._pmf_remove
        assert loss.delta(epsilon) == pytest.approx(
            pmf.get_delta_for_epsilon(epsilon), rel=1e-6, abs=1e-13
        )


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_composed_bound_is_googles_where_a_plain_fft_is_accurate(adjacency):
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    interval, delta = 1e-3, 1e-5
    relation = {
        Adjacency.ADD_REMOVE: NeighboringRelation.ADD_OR_REMOVE_ONE,
        Adjacency.ZERO_OUT: NeighboringRelation.REPLACE_SPECIAL,
        Adjacency.REPLACE_ONE: NeighboringRelation.REPLACE_ONE,
    }[adjacency]
    google = privacy_loss_distribution.from_gaussian_mechanism(
        1.0,
        value_discretization_interval=interval,
        sampling_prob=0.01,
        neighboring_relation=relation,
    ).self_compose(1000)
    found = 0.0
    for direction in directions(adjacency):
        part = connect_the_dots(SampledPair(direction, 1.0, 0.01, 1000), interval)
        found = max(found, tilted.compose([part], interval, 6.0).epsilon(delta))
    assert found == pytest.approx(google.get_epsilon_for_delta(delta), abs=1e-6)


def test_the_tilt_matters_only_for_tightness():
    """Any tilt gives an upper bound; and a bound without its slack would be caught below it."""
    pair = SampledPair("remove", 1.0, 0.01, 1000)
    exact = composed_epsilon([pair], 1e-5)
    part = connect_the_dots(pair, 1e-3)
    for tilt in (2.0, 5.0, 8.0):
        assert tilted.compose([part], 1e-3, tilt).epsilon(1e-5) >= exact


def test_optimistic_rounding_would_be_caught():
    """Negative control: rounding losses down instead of connecting the dots breaks the bound."""
    pair = SampledPair("remove", 1.0, 0.01, 1000)
    part = connect_the_dots(pair, 1e-3)
    down = Discretised(part.masses, part.lowest - 1, part.infinite, part.steps)
    assert tilted.compose([down], 1e-3, 6.0).epsilon(1e-5) < composed_epsilon([pair], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta"),
    [(0.715, 2.95e-4, 63, 2.2e-6), (2.5, 2.4e-5, 9, 5.5e-12)],
)
def test_where_the_contour_does_not_settle_the_grids_agree_with_pld(sigma, rate, steps, delta):
    from dptorch import accounting

    run = [SampledGaussian(sigma, rate, steps)]
    exact, pld = (accounting.get_accountant(name).epsilon(run, delta) for name in ("exact", "pld"))
    assert exact <= pld <= exact + 1e-3
    assert pld == pytest.approx(exact, rel=5e-3)
