"""Lower bounds against reference values, closed forms and brute force."""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, norm

from dptorch.accounting.pairs.sampled import gaussian_epsilon
from dptorch.audit import Evidence, judge
from dptorch.audit.bounds import (
    BOUNDS,
    OneRun,
    clopper_pearson_epsilon,
    get_bound,
    mu_lower_bound,
    mu_lower_bound_from_scores,
    one_run_epsilon,
    one_run_fdp_epsilon,
    one_run_p_value,
)
from dptorch.audit.bounds.many_runs import AtRate, count
from dptorch.audit.bounds.one_run_fdp import gaussian_mu_of
from dptorch.audit.result import prove
from dptorch.audit.thresholds import STRATEGIES, Explicit, Split
from dptorch.errors import ConfigurationError, DataError

ROWS = list(csv.DictReader((Path(__file__).parent / "reference.csv").open()))


def numbers(row: dict[str, str], *names: str) -> list[int]:
    return [int(row[name]) for name in names]


@pytest.mark.parametrize("row", [r for r in ROWS if r["kind"] == "one_run"])
def test_one_run_reference(row: dict[str, str]) -> None:
    counts = numbers(row, "m", "guesses", "correct")
    settings = {"delta": float(row["delta"]), "significance": float(row["significance"])}
    assert one_run_epsilon(*counts, **settings) == pytest.approx(float(row["eps_lower"]), abs=1e-4)
    expected = float(row["eps_lower_fdp_gaussian"])
    assert one_run_fdp_epsilon(*counts, **settings) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("row", [r for r in ROWS if r["kind"] == "clopper_pearson"])
def test_error_rates_reference(row: dict[str, str]) -> None:
    counts = numbers(row, "tp", "n_in", "fp", "n_out")
    delta, significance = float(row["delta"]), float(row["significance"])
    found = clopper_pearson_epsilon(*counts, delta=delta, significance=significance)
    assert found == pytest.approx(float(row["eps_lower"]), abs=1e-4)
    mu = mu_lower_bound(*counts, significance=significance)
    assert mu == pytest.approx(float(row["mu_lower"]), abs=1e-4)
    assert gaussian_epsilon(delta, mu) == pytest.approx(float(row["eps_lower_gdp"]), abs=1e-4)


def test_one_run_without_abstention_is_the_binomial_tail() -> None:
    # m ln-formula: all of m right refutes ε unless (1 + e^-ε)^-m >= significance.
    for m in (10, 24, 166):
        expected = -math.log(0.05 ** (-1 / m) - 1)
        assert one_run_epsilon(m, m, m) == pytest.approx(expected, abs=1e-6)


def test_the_term_for_delta_is_the_maximum_over_all_tails() -> None:
    m, r, v, epsilon, delta = 40, 30, 24, 0.7, 1e-3
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    tails = [sum(binom.pmf(k, r, right) for k in range(v - i, v)) / i for i in range(1, v + 1)]
    expected = binom.sf(v - 1, r, right) + 2 * m * delta * max(tails)
    assert one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


def test_more_right_guesses_prove_more_and_delta_less() -> None:
    found = [one_run_epsilon(1000, 200, v, delta=1e-5) for v in (120, 150, 180, 200)]
    assert found == sorted(found)
    assert one_run_epsilon(1000, 200, 180, delta=1e-3) < found[2]
    assert one_run_epsilon(1000, 200, 100, delta=1e-5) == 0.0


def test_clopper_pearson_covers_by_enumeration() -> None:
    # All outcomes of 12 + 12 games of randomised response, which meets its ε with equality.
    epsilon, n = 0.8, 12
    p = 1 / (1 + math.exp(-epsilon))
    wrong = 0.0
    for tp, fp in itertools.product(range(n + 1), repeat=2):
        if clopper_pearson_epsilon(tp, n, fp, n, significance=0.2) > epsilon:
            wrong += binom.pmf(tp, n, p) * binom.pmf(fp, n, 1 - p)
    assert wrong <= 0.2


def test_gaussian_counts_at_the_true_rates_approach_mu() -> None:
    n, mu = 10**7, 1.0
    found, alarms = round(n * norm.sf(0.5 - mu)), round(n * norm.sf(0.5))
    assert mu_lower_bound(found, n, alarms, n) == pytest.approx(mu, abs=0.003)


@pytest.mark.slow
def test_gaussian_scores_are_exact_by_simulation() -> None:
    # 4000 audits at α = 10 %: the share that errs is within 5 standard errors (2.4 points).
    rng = np.random.default_rng(0)
    for mu, n in ((0.5, 15), (2.0, 40), (8.0, 30)):
        wrong = 0
        for _ in range(1300):
            scores = Evidence.of(3 * rng.normal(mu, 1, n), 3 * rng.normal(0, 1, n))
            wrong += mu_lower_bound_from_scores(scores, significance=0.1) > mu
        assert wrong / 1300 == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 1300))


def test_scores_without_spread_prove_everything() -> None:
    scores = Evidence.of([1.0] * 30, [0.0] * 30)
    assert get_bound("gaussian").epsilon(scores, None, delta=1e-5, significance=0.05) == math.inf
    assert mu_lower_bound_from_scores(Evidence.of([0.0] * 30, [0.0] * 30)) == 0.0


def test_mu_and_epsilon_are_inverse() -> None:
    for mu in (0.05, 0.3, 1.0, 4.0):
        assert gaussian_mu_of(gaussian_epsilon(1e-5, mu), 1e-5) == pytest.approx(mu, rel=1e-6)


def test_a_fixed_rate_counts_that_share_of_errors() -> None:
    scores = Evidence.of(np.arange(10.0) + 5, np.arange(10.0))
    assert count(scores, AtRate(0.2)) == (7, 10, 2, 10)
    assert count(scores, AtRate(0.2, "members")) == (8, 10, 3, 10)
    assert count(scores, 9.0) == (6, 10, 1, 10)


def test_ties_are_not_broken_by_membership() -> None:
    """Half of the guesses among equal scores are right, whichever side the evidence lists first."""
    place = np.arange(1000)
    for member in (place < 500, place >= 500, place % 2 == 0):
        guesses, right = OneRun().guess(Evidence(np.zeros(1000), member), (0.1, 0.1))
        assert guesses == 200
        assert abs(right - 100) < 30  # four standard deviations


@pytest.mark.parametrize("name", BOUNDS)
def test_perfect_scores_reach_the_ceiling_and_no_more(name: str) -> None:
    bound = get_bound(name)
    rng = np.random.default_rng(1)
    perfect = Evidence(np.arange(400) + rng.random(400), np.arange(400) >= 200)
    ceiling = bound.ceiling(perfect, delta=1e-5, significance=0.05)
    for strategy in STRATEGIES.values():
        found = strategy.epsilon(bound, perfect, delta=1e-5, significance=0.05)
        assert 0 < found <= ceiling
    if name.startswith("one-run"):
        whole = Explicit((0.5, 0.5)).epsilon(bound, perfect, delta=1e-5, significance=0.05)
        assert whole == pytest.approx(ceiling)


def test_mistakes() -> None:
    few = Evidence.of(np.ones(9), np.zeros(10))
    with pytest.raises(ConfigurationError, match="at least 20"):
        judge(few, epsilon=1.0, delta=1e-5, adversary="x")
    fine = Evidence.of(np.ones(30), np.zeros(30))
    with pytest.raises(ConfigurationError, match="Did you mean 'one-run'"):
        judge(fine, epsilon=1.0, delta=1e-5, adversary="x", bound="one-rum")
    with pytest.raises(ConfigurationError, match="threshold='best'"):
        judge(fine, epsilon=1.0, delta=1e-5, adversary="x", threshold="best")
    with pytest.raises(ConfigurationError, match="significance"):
        judge(fine, epsilon=1.0, delta=1e-5, adversary="x", significance=1.5)
    with pytest.raises(ConfigurationError, match="correct <= guesses"):
        one_run_epsilon(10, 5, 6)
    with pytest.raises(ConfigurationError, match="guesses="):
        judge(fine, epsilon=1.0, delta=0.0, adversary="x", threshold=(0.9, 0.9))
    with pytest.raises(ConfigurationError, match="share"):
        Split(share=1.0)
    with pytest.raises(ConfigurationError, match="delta"):
        one_run_fdp_epsilon(100, 10, 9, delta=0.0)
    with pytest.raises(DataError, match="NaN"):
        Evidence([math.nan, 1.0], [True, False])
    with pytest.raises(DataError, match="shape"):
        Evidence([1.0], [True, False])


@pytest.mark.parametrize("bound", ["one-run", "one-run-fdp"])
def test_canaries_that_no_fair_coin_put_in_are_refused(bound: str) -> None:
    """With nine of ten in, noise alone would refute every claim."""
    rng = np.random.default_rng(0)
    scores, claim = rng.normal(size=1000), {"epsilon": 0.5, "delta": 1e-5, "adversary": "noise"}
    with pytest.raises(ConfigurationError, match="fair coin"):
        judge(Evidence(scores, rng.random(1000) < 0.9), bound=bound, **claim)
    fair = Evidence(scores, rng.random(1000) < 0.5)
    assert judge(fair, bound=bound, **claim).verdict == "NOT REFUTED"
    # Broken twin: guessing all in is right nine times of ten.
    twin = Evidence(scores, rng.random(1000) < 0.9)
    assert prove(twin, bound, (0.5, 0.0), delta=1e-5, significance=0.05).epsilon_lower > 0.5


def test_claims_and_memberships_that_are_none() -> None:
    scores, member = np.arange(40.0), np.arange(40) % 2
    for claim in ({"epsilon": math.nan}, {"epsilon": -1.0}, {"epsilon": "all"}, {"delta": 2.0}):
        with pytest.raises(ConfigurationError, match=next(iter(claim))):
            judge(
                Evidence(scores, member), adversary="none", **{"epsilon": 1.0, "delta": 0.1} | claim
            )
    with pytest.raises(ConfigurationError, match="two shares"):
        judge(Evidence(scores, member), epsilon=1.0, delta=0.1, adversary="a", threshold=0.5)
    for wrong in (member * 2, member * 0.7):
        with pytest.raises(DataError, match="truth values"):
            Evidence(scores, wrong)
