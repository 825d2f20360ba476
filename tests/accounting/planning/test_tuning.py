"""The cost of keeping the best of several runs, against mechanisms small enough to enumerate."""

import math

import numpy as np
import pytest
from scipy.special import logsumexp

from dptorch import accounting
from dptorch.accounting import RUN_LAWS, RunLaw, SampledGaussian, TruncatedPoissonGaussian
from dptorch.accounting.planning import tuning
from dptorch.errors import ConfigurationError, PrivacyError

ORDERS = np.concatenate([np.linspace(1.1, 10, 60), np.geomspace(11, 1000, 40)])


def divergence(p, q):
    log_p, log_q = np.log(p)[:, None], np.log(q)[:, None]
    return logsumexp(ORDERS * log_p + (1 - ORDERS) * log_q, axis=0) / (ORDERS - 1)


def best_of(p, law):
    """The law of the largest of K draws from p (outcomes rising), by the generating function of K."""
    gamma = law.success
    if law.name == "geometric":
        generate = lambda x: gamma * x / (1 - (1 - gamma) * x)
    else:
        generate = lambda x: np.log1p(-(1 - gamma) * x) / math.log(gamma)
    return np.diff(generate(np.concatenate([[0.0], np.cumsum(p)])))


BASES = [([0.6, 0.4], [0.4, 0.6]), ([0.5, 0.3, 0.2], [0.35, 0.4, 0.25]), ([0.9, 0.1], [0.8, 0.2])]


@pytest.mark.parametrize("name", ["logarithmic", "geometric"])
@pytest.mark.parametrize("mean", [1.5, 5.0, 40.0])
def test_no_enumerated_mechanism_exceeds_the_bound(name, mean):
    law = RunLaw(name, mean)
    exceeded = False
    for base in BASES:
        for p, q in (base, base[::-1]):
            one = np.maximum(divergence(p, q), divergence(q, p))
            real = divergence(best_of(p, law), best_of(q, law))
            assert np.all(real <= tuning._negative_binomial(ORDERS, one, law) + 1e-12)
            exceeded |= bool(np.any(real > 1.05 * one))
    assert exceeded, "negative control: the cost of one run is no bound on the best of several"


@pytest.mark.parametrize("mean", [0.5, 1.5, 5.0, 40.0])
def test_no_enumerated_mechanism_exceeds_the_bound_of_a_poisson_number(mean, monkeypatch):
    """The best of a Poisson number of draws; of none, a fixed outcome."""

    def best(p):
        below = np.exp(-mean * (1 - np.concatenate([[0.0], np.cumsum(p)])))
        return np.concatenate([below[:1], np.diff(below)])

    class Enumerated:
        def delta(self, history, epsilon, *, adjacency):
            return max(np.maximum(p - math.exp(epsilon) * q, 0).sum() for p, q in self.pairs)

    enumerated = Enumerated()
    monkeypatch.setattr(tuning.registry, "get_accountant", lambda name: enumerated)
    exceeded = False
    for p, q in BASES:
        p, q = np.array(p), np.array(q)
        enumerated.pairs = ((p, q), (q, p))
        one = np.maximum(divergence(p, q), divergence(q, p))
        bound = tuning._poisson([], ORDERS, one, mean, "add-remove")
        for real in (divergence(best(p), best(q)), divergence(best(q), best(p))):
            assert np.all(real <= bound + 1e-12)
            without = one + max(0.0, math.log(mean)) / (ORDERS - 1)
            exceeded |= bool(np.any(real > without + 1e-6))
    assert exceeded or mean < 5, "the broken twin: without the term mean_runs · δ'"


@pytest.mark.slow
def test_dp_accounting_differs_by_its_delta_alone(monkeypatch):
    """With the δ' that Rényi divergences give, its number comes out."""
    from dp_accounting import dp_event
    from dp_accounting.rdp import rdp_privacy_accountant

    run = [SampledGaussian(2.0, 0.01, 1000)]
    law = RunLaw("poisson", 10)
    theirs = rdp_privacy_accountant.RdpAccountant()
    one = dp_event.PoissonSampledDpEvent(0.01, dp_event.GaussianDpEvent(2.0))
    many = dp_event.SelfComposedDpEvent(one, 1000)
    theirs.compose(dp_event.RepeatAndSelectDpEvent(many, 10, math.inf))
    ours = accounting.tuned_epsilon(run, 1e-5, law)
    assert ours < 0.95 * theirs.get_epsilon(1e-5)
    rdp = accounting.get_accountant("rdp")
    monkeypatch.setattr(tuning.registry, "get_accountant", lambda name: rdp)
    assert accounting.tuned_epsilon(run, 1e-5, law) == pytest.approx(
        theirs.get_epsilon(1e-5), rel=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logarithmic", "geometric", "poisson"])
def test_run_laws_have_their_mean(name):
    """100,000 draws: the mean within 5 standard errors (false alarm 6e-7)."""
    law, rng = RunLaw(name, 7.0), np.random.default_rng(5)
    draws = np.array([law.draw(rng) for _ in range(100_000)])
    assert abs(draws.mean() - 7.0) < 5 * draws.std() / math.sqrt(draws.size)
    assert draws.min() == (0 if name == "poisson" else 1)
    assert RunLaw("fixed", 4).draw(rng) == 4


def test_pure_dp_is_the_published_factor():
    """As λ grows, (2 + η) ε: three times for the geometric law (Liu and Talwar), twice for η = 0."""
    one, orders = np.full(200, 0.1), np.geomspace(2, 1e9, 200)
    for name, factor in (("geometric", 3), ("logarithmic", 2)):
        total = tuning._negative_binomial(orders, one, RunLaw(name, 50.0))
        assert total[-1] == pytest.approx(factor * 0.1, rel=1e-6)


def test_a_gaussian_run_by_hand():
    """ε = min over λ, λ' of the two theorems' sum, with D_λ = λ / (2σ²), on a fine grid of orders."""
    sigma, delta, gamma = 4.0, 1e-6, 1 / 10
    orders = np.geomspace(1.01, 1000, 4000)
    one = orders / (2 * sigma**2)
    added = 2 * ((1 - 1 / orders) * one + math.log(1 / gamma) / orders)
    total = one + added.min() + math.log(10) / (orders - 1)
    # Canonne, Kamath, Steinke 2020, Proposition 12
    by_hand = (
        total + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    ).min()
    run = [SampledGaussian(sigma, 1.0, 1)]
    found = accounting.tuned_epsilon(run, delta, RunLaw("geometric", 10))
    assert by_hand <= found <= 1.01 * by_hand


@pytest.mark.slow
def test_it_costs_more_than_a_run_and_less_than_all():
    run = [SampledGaussian(2.0, 0.02, 500)]
    one = accounting.get_accountant("exact").epsilon(run, 1e-5)
    all_runs = accounting.tuned_epsilon(run, 1e-5, RunLaw("fixed", 30))
    assert all_runs == accounting.get_accountant("pld").epsilon(
        [SampledGaussian(2.0, 0.02, 15_000)], 1e-5
    )
    for name in ("logarithmic", "geometric", "poisson"):
        for adjacency in ("add-remove", "replace-one"):
            few, many = (
                accounting.tuned_epsilon(run, 1e-5, RunLaw(name, mean), adjacency=adjacency)
                for mean in (3, 30)
            )
            assert one < few < many
        assert accounting.tuned_epsilon(run, 1e-5, RunLaw(name, 30)) < all_runs


@pytest.mark.parametrize(
    ("name", "mean"),
    [("geometric", 1.0), ("logarithmic", 0.5), ("poisson", 0.0), ("fixed", 2.5)]
    + [(name, bad) for name in RUN_LAWS for bad in (math.nan, math.inf, -3.0)],
)
def test_bad_means_are_named(name, mean):
    with pytest.raises(ConfigurationError, match=f"mean_runs={mean}"):
        RunLaw(name, mean)


def test_edges():
    with pytest.raises(ConfigurationError, match="Did you mean 'geometric'"):
        RunLaw("geometrical", 3)
    law = RunLaw("geometric", 3)
    assert accounting.tuned_epsilon([SampledGaussian(0.0, 0.1, 1)], 1e-5, law) == math.inf
    truncated = [TruncatedPoissonGaussian(1.0, 0.01, 10, 1000, 60)]
    with pytest.raises(PrivacyError, match="plain Poisson"):
        accounting.tuned_epsilon(truncated, 1e-5, law)
    with pytest.raises(ConfigurationError, match="delta=1"):
        accounting.tuned_epsilon([SampledGaussian(1.0, 0.1, 1)], 1.0, law)
