"""Fixed-size sampling: the bound against real mechanisms, other people's bounds, and itself."""

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.stats import binom, norm

from dptorch import accounting
from dptorch.accounting import FixedSizeGaussian, SampledGaussian
from dptorch.accounting.composition import tilted
from dptorch.accounting.composition.composed import composed_epsilon
from dptorch.accounting.pairs.discretised import connect_the_dots
from dptorch.accounting.pairs.fixed_size import FixedSizePair, WithReplacementPair
from dptorch.accounting.pairs.sampled import SampledPair
from dptorch.errors import PrivacyError

QUADRATURE = 1e-7  # the trapezoid rule at the kink of (p - αq)_+
EPSILONS = [-1.5, -0.3, 0.0, 0.2, 1.0, 2.5]


def hockey_stick(p, q, epsilon, x):
    return float(trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), x))


def profile(pair, epsilon):
    """H at any real ε, from the pair's discretised masses: an upper bound, tight to the grid."""
    _, p, q = pair.cells(1e-3, -60.0)
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


def batches(records, size, replacement):
    """Every equally likely batch of `size` out of `records`."""
    if replacement:
        return list(itertools.product(records, repeat=size))
    return list(itertools.combinations(records, size))


def density(data, size, replacement, sigma, x):
    sums = [sum(batch) for batch in batches(data, size, replacement)]
    return np.mean([norm.pdf(x, total, sigma) for total in sums], axis=0)


WORLDS = [
    (1, 0, (0,)),
    (1, -1, (0, 0)),
    (1, -1, (-1, -1)),
    (-1, 1, (-1, -1)),
    (1, -1, (1, -1, 0)),
    (1, 0.3, (-1, 0.5)),
    (1, 0, (-1, -1, -1)),
]


@pytest.mark.slow
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_no_real_mechanism_exceeds_the_bound(sigma, replacement):
    """Scalar records in [-1, 1], every batch enumerated, x replaced by x': H_α <= the pair's."""
    x = np.linspace(-14 * sigma - 6, 14 * sigma + 6, 40_001)
    tightest = math.inf
    for (mine, theirs, rest), size in itertools.product(WORLDS, (1, 2)):
        p = density((mine, *rest), size, replacement, sigma, x)
        q = density((theirs, *rest), size, replacement, sigma, x)
        count = len(rest) + 1
        pair = FixedSizePair(sigma, size / count, 1)
        if replacement:
            pair = WithReplacementPair(sigma, size, count, 1)
        for epsilon in EPSILONS:
            real = hockey_stick(p, q, epsilon, x)
            assert real <= profile(pair, epsilon) + QUADRATURE
            if epsilon >= 0:
                assert real <= pair.one_step_delta(epsilon) + QUADRATURE
                if real > 1e-3:
                    tightest = min(tightest, pair.one_step_delta(epsilon) / real)
    assert tightest < 1.0001, "some world meets the bound, so it is not loose"


def test_two_steps_of_a_real_mechanism():
    """The composed bound holds in two dimensions, and composing `remove` alone would not be it."""
    sigma = 1.0
    x = np.linspace(-11, 11, 1201)
    pair = FixedSizePair(sigma, 0.5, 2)
    loss = tilted.compose([connect_the_dots(pair, 1e-3)], 1e-3, 2.0)
    for mine, theirs, rest in [(1, 0, (0,)), (1, -1, (-1,)), (1, -1, (0,)), (-1, 1, (-1,))]:
        p = density((mine, *rest), 1, False, sigma, x)
        q = density((theirs, *rest), 1, False, sigma, x)
        for epsilon in (0.0, 0.5, 2.0):
            excess = np.maximum(np.outer(p, p) - math.exp(epsilon) * np.outer(q, q), 0)
            real = float(trapezoid(trapezoid(excess, x), x))
            assert real <= loss.delta(epsilon) + 1e-7


@pytest.mark.parametrize("epsilon", [0.0, 0.4, 3.0])
def test_the_pair_has_the_profile_of_the_theorem(epsilon):
    """Above α = 1 that of `remove` with sensitivity 2, below that of `add`."""
    pair, remove = FixedSizePair(1.5, 0.2, 1), SampledPair("remove", 0.75, 0.2, 1)
    add = SampledPair("add", 0.75, 0.2, 1)
    assert pair.one_step_delta(epsilon) == remove.one_step_delta(epsilon)
    assert profile(pair, epsilon) == pytest.approx(remove.one_step_delta(epsilon), rel=1e-3)
    # H_α(add) = 1 - α + α H_{1/α}(remove)
    mirrored = 1 - math.exp(-epsilon) + math.exp(-epsilon) * remove.one_step_delta(epsilon)
    assert profile(pair, -epsilon) == pytest.approx(mirrored, rel=1e-3)
    assert profile(pair, epsilon) >= add.one_step_delta(epsilon) - 1e-12


def test_with_replacement_is_the_theorems_sum():
    """Balle, Barthe, Gaboardi 2018, Theorem 10, written down once more."""
    pair = WithReplacementPair(2.0, 30, 100, 1)
    q = 1 - 0.99**30
    for epsilon in (0.1, 1.0, 4.0):
        inner = math.log1p(math.expm1(epsilon) / q)
        truth = 0.0
        for k in range(1, 31):
            mu = 2 * k / 2.0
            gaussian = norm.cdf(mu / 2 - inner / mu) - math.exp(inner) * norm.cdf(
                -mu / 2 - inner / mu
            )
            truth += binom.pmf(k, 30, 0.01) * gaussian
        assert pair.one_step_delta(epsilon) == pytest.approx(truth, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1000), (2.0, 1000), (4.0, 30), (1.0, 1)])
def test_exact_and_pld_agree(sigma, steps):
    run = [FixedSizeGaussian(sigma, 600, 60_000, steps)]
    exact, pld = (
        accounting.get_accountant(name).epsilon(run, 1e-5, adjacency="replace-one")
        for name in ("exact", "pld")
    )
    assert exact - 1e-9 <= pld <= exact + 1e-3 * max(1.0, exact / 10)
    assert accounting.get_accountant("exact").delta(
        run, exact, adjacency="zero-out"
    ) == pytest.approx(1e-5, rel=1e-4)


def test_composing_each_direction_alone_would_be_caught():
    """Negative control: max(remove, add) composed alone is below the sound composition."""
    alone = max(
        composed_epsilon([SampledPair(d, 0.5, 0.01, 1000)], 1e-5) for d in ("remove", "add")
    )
    sound = composed_epsilon([FixedSizePair(1.0, 0.01, 1000)], 1e-5)
    assert alone < 0.95 * sound


@pytest.mark.slow
def test_rdp_improves_on_dp_accounting_with_its_factor_mended():
    """Wang, Balle, Kasiviswanathan 2019 as in `dp-accounting`; given σ it forgets the 2C: halve σ."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    def theirs(sigma):
        accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
        event = SampledWithoutReplacementDpEvent(60_000, 600, GaussianDpEvent(sigma))
        return accountant.compose(event, 1000).get_epsilon(1e-5)

    run = [FixedSizeGaussian(2.0, 600, 60_000, 1000)]
    exact, rdp = (
        accounting.get_accountant(name).epsilon(run, 1e-5, adjacency="replace-one")
        for name in ("exact", "rdp")
    )
    assert exact < rdp < theirs(1.0) < 3.6
    assert theirs(2.0) < 0.7 * exact, "negative control: the forgotten factor breaks the bound"


def test_every_record_every_step_is_the_gaussian_mechanism():
    run = [FixedSizeGaussian(10.0, 50, 50, 100)]
    plain = [SampledGaussian(10.0, 1.0, 100)]
    for name in ("exact", "pld", "rdp"):
        accountant = accounting.get_accountant(name)
        found = accountant.epsilon(run, 1e-5, adjacency="replace-one")
        assert found == pytest.approx(
            accountant.epsilon(plain, 1e-5, adjacency="replace-one"), rel=1e-3
        )


@pytest.mark.slow
def test_replacement_costs_more():
    cost = [
        accounting.get_accountant("pld").epsilon(
            [FixedSizeGaussian(4.0, 10, 100, 50, replacement)], 1e-5, adjacency="replace-one"
        )
        for replacement in (False, True)
    ]
    assert cost[0] < cost[1] < 2 * cost[0]


def test_refusals():
    exact, run = accounting.get_accountant("exact"), [FixedSizeGaussian(1.0, 10, 100, 5)]
    with pytest.raises(PrivacyError, match=r"rate depends on the number of records.*zero-out"):
        exact.epsilon(run, 1e-5, adjacency="add-remove")
    with pytest.raises(PrivacyError, match="These do: pld"):
        exact.epsilon([FixedSizeGaussian(1.0, 10, 100, 5, replacement=True)], 1e-5)
