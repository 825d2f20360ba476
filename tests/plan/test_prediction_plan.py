"""Plans of predictions: s/Δ against mpmath, budgets that fill up, and what is refused."""

import math

import mpmath as mp
import pytest

from dptorch.accounting import Adjacency, PureRelease, SampledGaussian, pure_epsilon
from dptorch.errors import ConfigurationError
from dptorch.plan.prediction_plan import ANSWERS, PredictionPlan

CONFIDENT = {"threshold": 10.0}


def make(mechanism, budget=(1.0, 1e-5), **rest):
    extra = CONFIDENT if mechanism == "confident-gnmax" else {}
    return PredictionPlan.make(mechanism, budget, **extra, **rest)


def scale_by_mpmath(epsilon, delta, queries):
    """s/Δ of k Gaussian answers: δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ) with μ = sqrt(k) Δ/s."""

    def excess(mu):
        return (
            mp.ncdf(mu / 2 - epsilon / mu)
            - mp.exp(epsilon) * mp.ncdf(-mu / 2 - epsilon / mu)
            - mp.mpf(delta)
        )

    with mp.workdps(40):
        low, high = mp.mpf("0.001"), mp.mpf(10)
        for _ in range(120):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) < 0 else (low, middle)
        return float(mp.sqrt(queries) / low)


@pytest.mark.parametrize(
    ("queries", "published"), [(1, 3.73), (10, 11.8), (100, 37.3), (1000, 118)]
)
def test_the_noise_for_a_number_of_answers(queries, published):
    found = make("gaussian", queries=queries).noise
    assert found == pytest.approx(published, rel=0.01)
    assert found == pytest.approx(scale_by_mpmath(1.0, 1e-5, queries), rel=1e-9)


def test_noise_for_one_answer_each_would_be_caught():
    """The broken twin: noise that is calibrated as if every answer were the only one."""
    wanted = scale_by_mpmath(1.0, 1e-5, 100)
    assert make("gaussian", queries=1).noise != pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("adjacency", list(Adjacency))
@pytest.mark.parametrize("mechanism", ANSWERS)
def test_prepaid_answers_fill_the_budget_and_no_more(mechanism, adjacency):
    plan = make(mechanism, (2.0, 1e-6), queries=50, adjacency=adjacency)
    history = [plan.event(50)]
    if plan.check_noise is not None:
        history.append(plan.check_event(50))
    assert plan.queries == 50
    assert sum(plan.share(event) for event in history) == pytest.approx(1, rel=1e-8)
    assert plan.epsilon(history) == pytest.approx(2.0, rel=1e-3)
    again = PredictionPlan.make(
        mechanism,
        (2.0, 1e-6),
        noise=plan.noise,
        adjacency=adjacency,
        threshold=plan.threshold,
        check_noise=plan.check_noise,
    )
    assert again.queries == 50


def test_what_is_reserved_is_what_all_answers_cost():
    plan = make("gaussian", queries=50)
    (whole,) = plan.whole()
    assert plan.epsilon([whole]) == pytest.approx(plan.epsilon([plan.event(50)]), rel=1e-9)
    assert make("laplace", queries=50).whole() == [make("laplace", queries=50).event(50)]


def test_pure_answers_by_the_exact_composition():
    plan = make("laplace", queries=400)
    assert pure_epsilon(plan.noise, 400, 1e-5) <= 1.0
    assert plan.noise > 2 * (1.0 / 400)  # what basic composition would give


def test_plans_survive_json():
    for mechanism in ANSWERS:
        plan = make(mechanism, queries=20, models=5, unit="user")
        assert PredictionPlan.from_json(plan.to_json()) == plan


def test_events_of_another_plan_have_no_share():
    for mechanism, event in [
        ("gaussian", PureRelease(0.1, 1)),
        ("laplace", SampledGaussian(1.0, 1.0, 1)),
        ("laplace", PureRelease(0.1, 1)),
        ("gaussian", SampledGaussian(1.0, 0.5, 1)),
    ]:
        with pytest.raises(ConfigurationError, match="not of the plan"):
            make(mechanism, queries=10).share(event)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": (-1.0, 1e-5)}, "epsilon=-1.0"),
        ({"budget": (math.inf, 1e-5)}, "epsilon=inf"),
        ({"budget": (math.nan, 1e-5)}, "epsilon=nan"),
        ({"budget": (True, 1e-5)}, "epsilon=True"),
        ({"budget": (1.0, 0.0)}, "delta=0.0"),
        ({"budget": (1.0, 1.0)}, "delta=1.0"),
        ({"budget": 8.0}, "the pair"),
        ({"queries": 0}, "queries=0"),
        ({"queries": 2.5}, "queries=2.5"),
        ({"queries": None}, "give one of them"),
        ({"noise": 3.0}, "give one of them"),
        ({"queries": None, "noise": -1.0}, "noise=-1.0"),
        ({"queries": None, "noise": 0.1}, "more than the budget"),
        ({"models": 0}, "models=0"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"mechanism": "gausian"}, "Did you mean 'gaussian'"),
        ({"threshold": 3.0}, "confident-gnmax"),
    ],
)
def test_bad_values_are_refused_by_name(arguments, message):
    given = {"mechanism": "gaussian", "budget": (1.0, 1e-5), "queries": 10} | arguments
    with pytest.raises(ConfigurationError, match=message):
        PredictionPlan.make(given.pop("mechanism"), given.pop("budget"), **given)
