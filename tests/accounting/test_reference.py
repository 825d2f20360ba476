"""Every accountant against the reference table, made with other people's packages and by other means.

Columns: `eps_reference` to 1e-7 (contour inversion by an independent code, or closed form), Google's
PLD at two intervals, the PRV interval, Opacus's RDP. Two of the settings are published ones.
"""

import csv
import math
from pathlib import Path

import mpmath as mp
import pytest

from dptorch import accounting
from dptorch.accounting import SampledGaussian
from dptorch.errors import PrivacyWarning

with (Path(__file__).parent / "reference.csv").open() as file:
    ROWS = list(csv.DictReader(file))


def every_row(test):
    return pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])(test)


def history(row, sigma_factor=1.0):
    return [SampledGaussian(float(row["sigma"]) * sigma_factor, float(row["q"]), int(row["steps"]))]


@every_row
def test_exact_meets_the_reference(row):
    found = accounting.get_accountant("exact").epsilon(history(row), float(row["delta"]))
    assert abs(found - float(row["eps_reference"])) < 1e-6


@every_row
def test_exact_lies_in_the_prv_interval(row):
    found = accounting.get_accountant("exact").epsilon(history(row), float(row["delta"]))
    assert float(row["prv_lower"]) <= found <= float(row["prv_upper"])


@pytest.mark.slow
@every_row
def test_pld_is_an_upper_bound_and_tight(row):
    """The web-scale row is where a plain FFT fails: 1.7169 there, for a true 1.7105."""
    found = accounting.get_accountant("pld").epsilon(history(row), float(row["delta"]))
    exact = accounting.get_accountant("exact").epsilon(history(row), float(row["delta"]))
    assert exact <= found < exact + 1e-3


@every_row
def test_rdp_is_at_most_that_of_opacus_and_at_least_exact(row):
    """The table's is that of Opacus 1.6, whose divergences are exact at fractional orders too."""
    found = accounting.get_accountant("rdp").epsilon(history(row), float(row["delta"]))
    assert float(row["eps_reference"]) <= found <= float(row["rdp_opacus"]) + 1e-8


@every_row
def test_two_percent_less_noise_is_above_that_of_opacus(row):
    """The broken twin of the test above."""
    found = accounting.get_accountant("rdp").epsilon(history(row, 0.98), float(row["delta"]))
    assert found > float(row["rdp_opacus"]) + 1e-3


@every_row
def test_gdp_meets_the_table_and_warns(row):
    if not row["gdp_clt"]:
        assert accounting.get_accountant("gdp").epsilon(history(row), 1e-5) > 0
        return
    with pytest.warns(PrivacyWarning, match="no bound"):
        found = accounting.get_accountant("gdp").epsilon(history(row), float(row["delta"]))
    assert found == pytest.approx(float(row["gdp_clt"]), abs=2e-6)


@pytest.mark.slow
@every_row
@pytest.mark.parametrize("name", ["exact", "pld"])
def test_delta_is_the_inverse_of_epsilon(row, name):
    accountant, delta = accounting.get_accountant(name), float(row["delta"])
    epsilon = accountant.epsilon(history(row), delta)
    assert accountant.delta(history(row), epsilon) == pytest.approx(delta, rel=1e-5)


@pytest.mark.slow
def test_the_table_catches_one_percent_less_noise():
    """Negative control: the tolerance above is not so wide that a wrong σ would pass."""
    for row in ROWS:
        found = accounting.get_accountant("exact").epsilon(history(row, 0.99), float(row["delta"]))
        assert found > float(row["eps_reference"]) + 1e-3 * float(row["eps_reference"])


def test_every_row_is_there():
    assert len(ROWS) == 14
    assert all(math.isfinite(float(row["eps_reference"])) for row in ROWS)


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"),
    [(1.0, 1, 1e-5), (5.0, 1000, 1e-6), (0.3, 3, 1e-8), (100.0, 50, 1e-4), (30.0, 10**5, 1e-12)],
)
def test_exact_meets_rows_from_the_gaussian_closed_form(sigma, steps, delta):
    """Sampling nothing: δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ), solved in 60 digits."""
    with mp.workdps(60):
        mu = mp.sqrt(steps) / mp.mpf(sigma)
        gap = lambda e: (
            mp.log(mp.ncdf(mu / 2 - e / mu) - mp.e**e * mp.ncdf(-mu / 2 - e / mu)) - mp.log(delta)
        )
        guess = mu**2 / 2 + mu * mp.sqrt(-2 * mp.log(delta))
        truth = float(mp.findroot(gap, (guess * 0.5, guess), solver="anderson", tol=1e-20))
    run = [SampledGaussian(sigma, 1.0, steps)]
    assert accounting.get_accountant("exact").epsilon(run, delta) == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize(("sigma", "rate", "delta"), [(1.0, 0.1, 1e-4), (0.7, 0.01, 1e-6)])
def test_exact_meets_rows_from_one_steps_closed_form(sigma, rate, delta):
    """One step: q times the Gaussian's δ at log(1 + (e^ε - 1) / q), solved in 40 digits."""
    with mp.workdps(40):
        mu, q = 1 / mp.mpf(sigma), mp.mpf(rate)

        def gap(e):
            inner = mp.log(1 + (mp.e**e - 1) / q)
            gaussian = mp.ncdf(mu / 2 - inner / mu) - mp.e**inner * mp.ncdf(-mu / 2 - inner / mu)
            return mp.log(q * gaussian) - mp.log(delta)

        truth = float(mp.findroot(gap, (0.01, 3.0), solver="anderson", tol=1e-20))
    found = accounting.get_accountant("exact").epsilon([SampledGaussian(sigma, rate, 1)], delta)
    assert found == pytest.approx(truth, abs=1e-6)
