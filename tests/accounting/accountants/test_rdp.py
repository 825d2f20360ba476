"""The Rényi accountant beside Opacus's, whose orders are among ours."""

import numpy as np
import pytest

from dptorch.accounting import SampledGaussian, get_accountant
from dptorch.accounting.accountants import rdp

opacus = pytest.importorskip("opacus.accountants", reason="peers are optional")

GRID = [
    (noise, rate, steps, delta)
    for noise in (0.5, 0.8, 1.0, 2.0)
    for rate in (1e-3, 0.05, 0.5)
    for steps, delta in ((1, 1e-5), (100, 1e-8), (10_000, 1e-5))
]


def excess(noise: float, rate: float, steps: int, delta: float) -> float:
    """How far our ε is above Opacus's, relative."""
    theirs = opacus.RDPAccountant()
    theirs.history = [(noise, rate, steps)]
    ours = get_accountant("rdp").epsilon([SampledGaussian(noise, rate, steps)], delta)
    return ours / theirs.get_epsilon(delta) - 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Optimal order")
@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), GRID)
def test_no_epsilon_is_above_opacus(noise, rate, steps, delta):
    assert excess(noise, rate, steps, delta) < 1e-6


@pytest.mark.filterwarnings("ignore:Optimal order")
def test_without_fractional_orders_it_would_be(monkeypatch):
    """The broken twin: integer orders alone."""
    whole = np.arange(2.0, 64.0)
    monkeypatch.setattr(rdp, "renyi_orders", lambda: whole)
    rdp._one_step.cache_clear()
    found = excess(0.5, 0.05, 10_000, 1e-5)
    rdp._one_step.cache_clear()
    assert found > 1e-3


def test_orders_of_opacus_are_among_ours():
    assert set(opacus.RDPAccountant.DEFAULT_ALPHAS) <= set(rdp.renyi_orders())
