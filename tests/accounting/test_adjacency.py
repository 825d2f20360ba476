"""Replace-one moves the sum by 2C: every accountant must know, `dp-accounting`'s RDP does not."""

import pytest

from dptorch import accounting
from dptorch.accounting import Adjacency, SampledGaussian
from dptorch.errors import ConfigurationError, PrivacyWarning

NAMES = ["exact", "pld", "rdp", "gdp"]


@pytest.mark.parametrize("name", NAMES)
def test_without_sampling_replace_one_is_half_the_noise(name):
    accountant = accounting.get_accountant(name)
    replace = accountant.epsilon([SampledGaussian(2.0, 1.0, 10)], 1e-5, adjacency="replace-one")
    halved = accountant.epsilon([SampledGaussian(1.0, 1.0, 10)], 1e-5)
    assert replace == pytest.approx(halved, rel=1e-6)


def test_the_forgotten_factor_is_caught():
    """Negative control: dp-accounting's own RDP of ten Gaussians under REPLACE_ONE fails that test."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    broken = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    broken.compose(GaussianDpEvent(2.0), 10)
    halved = accounting.get_accountant("rdp").epsilon([SampledGaussian(1.0, 1.0, 10)], 1e-5)
    assert broken.get_epsilon(1e-5) != pytest.approx(halved, rel=1e-1)
    assert broken.get_epsilon(1e-5) < 0.5 * halved


@pytest.mark.parametrize("name", ["exact", "pld", "rdp"])
@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 0.01, 1000), (2.0, 0.3, 20)])
def test_replace_one_lies_between_one_change_and_half_the_noise(name, sigma, rate, steps):
    """More than add/remove; less than doubling the sensitivity of a whole step, once sampled."""
    accountant = accounting.get_accountant(name)
    run = [SampledGaussian(sigma, rate, steps)]
    once = accountant.epsilon(run, 1e-5)
    replace = accountant.epsilon(run, 1e-5, adjacency=Adjacency.REPLACE_ONE)
    halved = accountant.epsilon([SampledGaussian(sigma / 2, rate, steps)], 1e-5)
    assert once * 1.05 < replace < halved


@pytest.mark.parametrize(("sigma", "expected"), [(1.0, 2.8434), (2.0, 1.2052)])
def test_poisson_replace_one_meets_googles_pld(sigma, expected):
    run = [SampledGaussian(sigma, 0.01, 1000)]
    found = accounting.get_accountant("exact").epsilon(run, 1e-5, adjacency="replace-one")
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["exact", "pld", "rdp"])
def test_zero_out_costs_what_add_remove_costs(name):
    run = [SampledGaussian(1.0, 0.02, 300)]
    found = [
        accounting.get_accountant(name).epsilon(run, 1e-5, adjacency=a) for a in list(Adjacency)[:2]
    ]
    assert found[0] == found[1]


def test_rdp_bounds_exact_under_every_adjacency():
    for adjacency in Adjacency:
        run = [SampledGaussian(1.0, 0.02, 300)]
        exact, rdp = (
            accounting.get_accountant(name).epsilon(run, 1e-5, adjacency=adjacency)
            for name in ("exact", "rdp")
        )
        assert exact < rdp


def test_gdp_estimates_replace_one():
    run = [SampledGaussian(4.0, 0.01, 10_000)]
    with pytest.warns(PrivacyWarning):
        found = accounting.get_accountant("gdp").epsilon(run, 1e-5, adjacency="replace-one")
    exact = accounting.get_accountant("exact").epsilon(run, 1e-5, adjacency="replace-one")
    assert found == pytest.approx(exact, rel=0.03)


def test_sensitivity_and_names():
    assert [member.sensitivity_factor for member in Adjacency] == [1.0, 1.0, 2.0]
    with pytest.raises(ConfigurationError, match="replace-one"):
        Adjacency.of("replace")
