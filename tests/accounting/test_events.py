"""Events: their JSON, their checks, and those that reduce to a Gaussian or to Poisson sampling."""

import json
import math

import mpmath as mp
import pytest

from dptorch import accounting
from dptorch.accounting import (
    BufferedGaussian,
    CorrelatedGaussian,
    CyclicGaussian,
    EpochwiseGaussian,
    Event,
    FixedSizeGaussian,
    PureRelease,
    RandomAllocationGaussian,
    SampledDiscreteGaussian,
    SampledGaussian,
    SeparatedGaussian,
    TruncatedPoissonGaussian,
)
from dptorch.accounting.pairs.sampled import gaussian_epsilon
from dptorch.errors import ConfigurationError

EVENTS = [
    SampledGaussian(1.0, 0.01, 1000),
    TruncatedPoissonGaussian(1.0, 0.01, 1000, sample_size=60_000, capacity=800),
    RandomAllocationGaussian(1.0, steps_per_epoch=100, steps=1000, selections=2),
    FixedSizeGaussian(1.0, batch_size=600, sample_size=60_000, steps=1000, replacement=True),
    EpochwiseGaussian(1.0, steps_per_epoch=100, steps=1000),
    CorrelatedGaussian(1.0, sensitivity=2.5),
    SampledDiscreteGaussian(1.0, 0.01, 1000),
    PureRelease(0.1, steps=100),
    CyclicGaussian(1.0, 0.08, bands=8, steps=100),
    SeparatedGaussian(1.0, (1.0, -0.5), separation=10, steps=30),
    BufferedGaussian(1.0, (0.5, 0.9), separation=10, steps=30),
]
every_event = pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)


@every_event
def test_events_survive_json(event):
    back = Event.from_dict(json.loads(json.dumps(event.to_dict())))
    assert back == event
    assert hash(back) == hash(event)
    assert type(back) is type(event)


def test_every_event_is_listed_here():
    shipped = {kind for kind in Event.__subclasses__() if kind.__module__.startswith("dptorch.")}
    assert {type(event) for event in EVENTS} == shipped


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"event": "SampledGausian"}, "Did you mean 'SampledGaussian'"),
        ({}, "event=None"),
        ({**EVENTS[0].to_dict(), "colour": 1}, "another version"),
        ({"event": "SampledGaussian", "steps": 3}, "another version"),
        ({**EVENTS[0].to_dict(), "steps": 2.5}, "steps=2.5"),
    ],
)
def test_other_peoples_json_is_refused(values, message):
    with pytest.raises(ConfigurationError, match=message):
        Event.from_dict(values)


@every_event
@pytest.mark.parametrize(
    ("name", "bad"),
    [("noise_multiplier", -1.0), ("noise_multiplier", math.nan), ("steps", 1.5), ("steps", -1)],
)
def test_bad_fields_are_named(event, name, bad):
    if name not in event.to_dict():  # an event without Gaussian noise
        assert type(event) is PureRelease
        name = "epsilon"
    with pytest.raises(ConfigurationError, match=f"{name}={bad}"):
        Event.from_dict({**event.to_dict(), name: bad})


@pytest.mark.parametrize(
    ("event", "name", "bad"),
    [
        (EVENTS[1], "capacity", 0),
        (EVENTS[1], "sample_size", 1e4),
        (EVENTS[1], "sample_rate", 0.0),
        (EVENTS[2], "selections", 101),
        (EVENTS[2], "steps_per_epoch", 0),
        (EVENTS[3], "batch_size", True),
        (EVENTS[4], "steps_per_epoch", math.inf),
        (EVENTS[5], "sensitivity", 0.0),
        (EVENTS[5], "sensitivity", math.inf),
        (EVENTS[7], "epsilon", 0.0),
        (EVENTS[7], "epsilon", math.inf),
        (EVENTS[8], "sample_rate", 1.5),
        (EVENTS[8], "bands", 0),
        (EVENTS[9], "separation", 0),
    ],
)
def test_bad_fields_of_one_kind_are_named(event, name, bad):
    with pytest.raises(ConfigurationError, match=f"{name}={bad}"):
        Event.from_dict({**event.to_dict(), name: bad})


@pytest.mark.parametrize("name", ["exact", "pld", "rdp", "gdp"])
@pytest.mark.parametrize(
    ("event", "mu"),
    [
        (EpochwiseGaussian(10.0, steps_per_epoch=7, steps=700), 1.0),
        (EpochwiseGaussian(10.0, steps_per_epoch=7, steps=694), 1.0),
        (CorrelatedGaussian(2.5, sensitivity=2.5), 1.0),
    ],
)
def test_once_an_epoch_and_correlated_noise_are_gaussians(name, event, mu):
    for adjacency, factor in (("add-remove", 1), ("zero-out", 1), ("replace-one", 2)):
        found = accounting.get_accountant(name).epsilon([event], 1e-5, adjacency=adjacency)
        truth = gaussian_epsilon(1e-5, factor * mu)
        slack = 0.1 * truth if name == "rdp" else 1e-3
        assert truth - 1e-9 <= found <= truth + slack


def test_what_would_be_claimed_for_a_shuffled_loader():
    """10 epochs of 100 steps at σ = 1: 17.857 against 1.828 under Poisson sampling."""
    event = EpochwiseGaussian(1.0, steps_per_epoch=100, steps=1000)
    exact = accounting.get_accountant("exact")
    assert exact.epsilon([event], 1e-5) == pytest.approx(17.857, abs=1e-3)
    assert exact.epsilon([event.if_poisson()], 1e-5) == pytest.approx(1.8282367, abs=1e-6)


def test_overflow_by_multi_precision():
    for rate, size, capacity in [(0.01, 60_000, 800), (1e-4, 100_000, 50), (0.5, 20, 15)]:
        with mp.workdps(40):
            q, k = mp.mpf(rate), capacity + 1
            term = mp.binomial(size, k) * q**k * (1 - q) ** (size - k)
            truth = mp.mpf(0)
            while term > truth * mp.mpf(10) ** -30:
                truth += term
                term *= (size - k) * q / ((k + 1) * (1 - q))
                k += 1
        event = TruncatedPoissonGaussian(1.0, rate, 7, size, capacity)
        assert event.overflow == pytest.approx(float(7 * truth), rel=1e-9)


def truncated(capacity):
    return [TruncatedPoissonGaussian(1.0, 0.01, 1000, sample_size=60_000, capacity=capacity)]


@pytest.mark.parametrize("name", ["rdp"])
def test_truncation_costs_delta_and_epsilon_jointly(name):
    """δ(ε) = δ_Poisson(ε) + (1 + e^ε) overflow, and ε is its inverse, where no pair is composed."""
    accountant, poisson = accounting.get_accountant(name), [SampledGaussian(1.0, 0.01, 1000)]
    run = truncated(740)  # overflow about 1e-5 in all
    overflow = run[0].overflow
    assert 1e-5 < overflow < 2e-5
    for epsilon in (0.5, 2.0):
        expected = accountant.delta(poisson, epsilon) + (1 + math.exp(epsilon)) * overflow
        assert accountant.delta(run, epsilon) == pytest.approx(expected, rel=1e-9)
    delta = 30 * overflow
    epsilon = accountant.epsilon(run, delta)
    assert epsilon > accountant.epsilon(poisson, delta)
    assert accountant.delta(run, epsilon) <= delta * (1 + 1e-9)
    assert accountant.delta(run, epsilon * (1 - 1e-6)) > delta


def test_a_safe_capacity_costs_no_epsilon_and_a_small_one_much():
    exact = accounting.get_accountant("exact")
    poisson = exact.epsilon([SampledGaussian(1.0, 0.01, 1000)], 1e-5)
    safe = TruncatedPoissonGaussian.safe_capacity(0.01, 60_000, 1000)
    assert exact.epsilon(truncated(safe), 1e-5) == pytest.approx(poisson, abs=1e-5)
    assert exact.epsilon(truncated(safe), 1e-5) >= poisson
    assert 2 * poisson < exact.epsilon(truncated(650), 1e-5) < math.inf
    rdp = accounting.get_accountant("rdp")
    assert rdp.epsilon(truncated(650), 1e-5) == math.inf
    assert rdp.delta(truncated(600), 1.0) == 1.0
    assert exact.epsilon(truncated(60_000), 1e-5) == poisson


@pytest.mark.parametrize("name", ["exact", "pld", "rdp"])
def test_histories_of_different_kinds_compose(name):
    """Poisson, shuffled and correlated steps in any order; a Gaussian part equals its own event."""
    accountant = accounting.get_accountant(name)
    mixed = [EVENTS[0], EpochwiseGaussian(5.0, 100, 300), CorrelatedGaussian(8.0, 2.0)]
    same = [SampledGaussian(5.0, 1.0, 3), EVENTS[0], SampledGaussian(4.0, 1.0, 1)]
    for adjacency in ("add-remove", "replace-one"):
        found = accountant.epsilon(mixed, 1e-5, adjacency=adjacency)
        assert found == accountant.epsilon(same, 1e-5, adjacency=adjacency)
        assert found > accountant.epsilon(mixed[:2], 1e-5, adjacency=adjacency)
