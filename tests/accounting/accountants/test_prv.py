"""The optional accountant of Gopi, Lee and Wutschitz."""

import sys

import pytest

from dptorch import accounting
from dptorch.accounting import Adjacency, SampledGaussian
from dptorch.accounting.pairs.reduction import reduce_history
from dptorch.accounting.pairs.sampled import SampledPair
from dptorch.errors import ConfigurationError

RUN = [SampledGaussian(1.0, 0.01, 200)]


@pytest.mark.slow
@pytest.mark.parametrize("adjacency", ["add-remove", "replace-one"])
def test_the_interval_holds_exact(adjacency):
    pytest.importorskip("prv_accountant")
    accountant = accounting.get_accountant("prv")
    exact = accounting.get_accountant("exact").epsilon(RUN, 1e-5, adjacency=adjacency)
    pairs = reduce_history(RUN, Adjacency(adjacency)).compositions[0]
    lower, estimate, upper = accountant.interval(pairs, 1e-5)
    assert lower <= exact <= upper == accountant.epsilon(RUN, 1e-5, adjacency=adjacency)
    assert estimate == pytest.approx(exact, abs=1e-3)
    assert 0.9e-5 < accountant.delta(RUN, exact, adjacency=adjacency) < 1.3e-5


def test_the_packages_own_mechanism_agrees():
    prv = pytest.importorskip("prv_accountant")
    package = prv.PRVAccountant(
        prvs=[prv.PoissonSubsampledGaussianMechanism(0.01, 1.0)],
        max_self_compositions=[200],
        eps_error=0.01,
        delta_error=1e-8,
    )
    found = accounting.get_accountant("glw").interval(
        (SampledPair("remove", 1.0, 0.01, 200),), 1e-5
    )
    assert found == pytest.approx(package.compute_epsilon(1e-5, [200]), abs=1e-6)


def test_without_the_package_the_way_out_is_named(monkeypatch):
    from dptorch.accounting.accountants import prv

    prv._composed.cache_clear()
    monkeypatch.setitem(sys.modules, "prv_accountant", None)
    with pytest.raises(ConfigurationError, match="pip install prv-accountant"):
        accounting.get_accountant("prv").epsilon(RUN, 1e-5)
