"""What is refused, and that the message says how to go on."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from dptorch import accounting
from dptorch.accounting import Event, SampledGaussian
from dptorch.errors import ConfigurationError, PrivacyError

GOOD = {"sample_rate": 0.01, "noise_multiplier": 1.0, "steps": 10, "delta": 1e-5}


@pytest.mark.parametrize(
    "bad",
    [
        {"sample_rate": 0.0},
        {"sample_rate": 1.01},
        {"sample_rate": -0.1},
        {"sample_rate": math.nan},
        {"sample_rate": "0.01"},
        {"sample_rate": None},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": True},
        {"steps": 10.5},
        {"steps": 10.0},
        {"steps": -1},
        {"steps": True},
        {"steps": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": -1e-5},
        {"delta": math.nan},
        {"delta": "1e-5"},
        {"delta": None},
        {"accountant": "moments"},
        {"adjacency": "swap"},
    ],
    ids=str,
)
def test_a_bad_value_is_named(bad):
    with pytest.raises(ConfigurationError) as caught:
        accounting.epsilon(**{**GOOD, **bad})
    (name, value), *_ = bad.items()
    assert f"{name}={value!r}" in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, True])
def test_a_bad_target_is_named(bad):
    with pytest.raises(ConfigurationError, match="target_epsilon="):
        accounting.noise_multiplier(target_epsilon=bad, delta=1e-5, sample_rate=0.1, steps=3)
    with pytest.raises(ConfigurationError, match="epsilon="):
        accounting.get_accountant("exact").delta([SampledGaussian(1.0, 0.1, 3)], bad)


def test_numpy_numbers_are_welcome():
    event = SampledGaussian(np.float32(1.0), np.float64(0.25), np.int64(3))
    assert event == SampledGaussian(1.0, 0.25, 3)
    assert type(event.steps) is int
    assert hash(event) == hash(SampledGaussian(1.0, 0.25, 3))


@dataclass(frozen=True)
class Invented(Event):
    """A mechanism for which nobody has a theorem."""

    steps: int

    @property
    def kind(self) -> str:
        return "invented mechanism"


@pytest.mark.parametrize("name", accounting.accountant_names())
def test_an_event_nobody_covers_is_refused_by_name(name):
    accountant = accounting.get_accountant(name)
    history = [SampledGaussian(1.0, 0.1, 3), Invented(5)]
    with pytest.raises(PrivacyError, match=r"invented mechanism.*without amplification"):
        accountant.epsilon(history, 1e-5)
    with pytest.raises(PrivacyError, match=accountant.name):
        accountant.delta(history, 1.0)


def test_the_refusal_names_who_does_cover_it():
    """Held against the accountants themselves, which are not asked when the error is made."""
    event = accounting.RandomAllocationGaussian(1.0, steps_per_epoch=10, steps=20)
    able = [n for n in accounting.accountant_names() if accounting.get_accountant(n).covers(event)]
    assert able == ["pld"]
    with pytest.raises(PrivacyError, match=r"These do: pld\."):
        accounting.get_accountant("prv").epsilon([event], 1e-5)


def test_what_is_no_event_is_refused():
    with pytest.raises(ConfigurationError, match="not an accounting event"):
        accounting.get_accountant("exact").epsilon([(1.0, 0.1, 3)], 1e-5)


def test_unknown_accountants_get_a_suggestion():
    with pytest.raises(ConfigurationError, match="Did you mean 'exact'"):
        accounting.get_accountant("exat")


def test_bounds_are_told_apart_from_estimates():
    claims = {
        name: accounting.get_accountant(name).is_upper_bound
        for name in accounting.accountant_names()
    }
    assert claims == {"exact": False, "pld": True, "rdp": True, "prv": True, "gdp": False}
    assert all(
        isinstance(accounting.get_accountant(name), accounting.Accountant) for name in claims
    )


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ["pld", "exact", "rdp"])
def test_a_target_of_zero_is_answered_at_once(accountant):
    run = {"sample_rate": 0.01, "steps": 1000}
    noise = accounting.noise_multiplier(
        target_epsilon=0.0, delta=1e-5, accountant=accountant, **run
    )

    assert accounting.delta(epsilon=0.0, noise_multiplier=noise, accountant="exact", **run) <= 1e-5
    assert noise < 1e5


def test_a_target_of_zero_for_other_events_is_refused_in_words():
    from dptorch.accounting import EpochwiseGaussian

    with pytest.raises(ConfigurationError, match="must be above 0"):
        accounting.noise_multiplier_for(
            lambda noise: EpochwiseGaussian(noise, 10, 100), target_epsilon=0.0, delta=1e-5
        )


@pytest.mark.parametrize("accountant", accounting.accountant_names())
@pytest.mark.parametrize("noise", [1e-200, 1e-9, 1e-3])
@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_noise_of_a_hair_counts_as_none(accountant, noise, rate):
    run = {"sample_rate": rate, "noise_multiplier": noise, "steps": 10, "accountant": accountant}
    assert accounting.epsilon(delta=1e-5, **run) == math.inf
    assert accounting.delta(epsilon=1.0, **run) == 1.0
