"""The five faces: each solves for what the others were given, and errs to the safe side."""

import math

import pytest

from dptorch import accounting
from dptorch.accounting.composition import contour
from dptorch.errors import ConfigurationError

# (q, T, ε, δ) -> σ of an independent contour code, to six digits.
CALIBRATED = [
    (0.01, 1000, 3.0, 1e-5, 0.813584),
    (0.01, 10_000, 3.0, 1e-5, 1.564966),
    (0.001, 50_000, 1.0, 1e-6, 1.163566),
]


@pytest.mark.slow
@pytest.mark.parametrize(("q", "steps", "epsilon", "delta", "sigma"), CALIBRATED)
@pytest.mark.parametrize("name", ["exact", "pld"])
def test_calibration_meets_the_reference_and_is_safe(name, q, steps, epsilon, delta, sigma):
    found = accounting.noise_multiplier(
        target_epsilon=epsilon, delta=delta, sample_rate=q, steps=steps, accountant=name
    )
    assert found == pytest.approx(sigma, rel=2e-6 if name == "exact" else 5e-4)
    spent = accounting.epsilon(
        sample_rate=q, noise_multiplier=found, steps=steps, delta=delta, accountant=name
    )
    assert epsilon - 1e-4 < spent <= epsilon


def test_exact_calibration_takes_few_evaluations(monkeypatch):
    """Of the moment generating function: on real points, and at the nodes of each contour."""
    points, nodes = [], []
    log_mgf, line = contour.log_mgf, contour._line

    def counted_line(pairs, t, step, count, tail):
        nodes.append(count)
        return line(pairs, t, step, count, tail)

    monkeypatch.setattr(contour, "log_mgf", lambda *a: points.append(a) or log_mgf(*a))
    monkeypatch.setattr(contour, "_line", counted_line)
    accounting.noise_multiplier(
        target_epsilon=3.0, delta=1e-5, sample_rate=0.01, steps=10_000, accountant="exact"
    )
    assert 0 < len(points) < 1000
    assert 0 < sum(nodes) < 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "pld", "rdp"])
@pytest.mark.parametrize("adjacency", ["add-remove", "replace-one"])
def test_the_faces_are_inverse_to_each_other(name, adjacency):
    run = {"noise_multiplier": 1.2, "sample_rate": 0.02, "steps": 400}
    asked = {"accountant": name, "adjacency": adjacency}
    target = accounting.epsilon(**run, delta=1e-5, **asked) * (1 + 1e-9)
    goal = {"target_epsilon": target, "delta": 1e-5, **asked}
    sigma = accounting.noise_multiplier(sample_rate=0.02, steps=400, **goal)
    assert sigma == pytest.approx(1.2, rel=1e-4)
    assert accounting.steps(sample_rate=0.02, noise_multiplier=1.2, **goal) in (399, 400)
    rate = accounting.sample_rate(noise_multiplier=1.2, steps=400, **goal)
    assert rate == pytest.approx(0.02, rel=1e-4)
    assert accounting.delta(**run, epsilon=target, **asked) <= 1e-5 * (1 + 1e-6)


def test_one_more_step_would_be_too_many():
    given = {"delta": 1e-5, "sample_rate": 0.05, "noise_multiplier": 0.9, "accountant": "exact"}
    count = accounting.steps(target_epsilon=4.0, **given)
    costs = [accounting.epsilon(steps=n, **given) for n in (count, count + 1)]
    assert costs[0] <= 4.0 < costs[1]


@pytest.mark.slow
@pytest.mark.parametrize("target", [1e-3, 0.1, 30.0, 500.0])
def test_far_targets(target):
    sigma = accounting.noise_multiplier(
        target_epsilon=target, delta=1e-6, sample_rate=0.05, steps=200, accountant="exact"
    )
    spent = accounting.epsilon(
        sample_rate=0.05, noise_multiplier=sigma, steps=200, delta=1e-6, accountant="exact"
    )
    assert 0.999 * target < spent <= target


@pytest.mark.slow
def test_a_target_of_zero_is_reached_through_delta():
    sigma = accounting.noise_multiplier(
        target_epsilon=0.0, delta=1e-3, sample_rate=0.01, steps=10, accountant="exact"
    )
    run = {"sample_rate": 0.01, "noise_multiplier": sigma, "steps": 10, "accountant": "exact"}
    assert accounting.epsilon(delta=1e-3, **run) == 0.0
    assert accounting.delta(epsilon=0.0, **run) == pytest.approx(1e-3, rel=1e-5)


def test_nothing_released_needs_no_noise():
    assert (
        accounting.noise_multiplier(target_epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=0) == 0.0
    )


def test_generous_targets_take_every_record():
    rate = accounting.sample_rate(
        target_epsilon=50.0, delta=1e-5, noise_multiplier=5.0, steps=3, accountant="exact"
    )
    assert rate == 1.0


@pytest.mark.slow
def test_unreachable_noise_names_the_smallest_epsilon():
    """RDP stops at order 1024, so at δ = 1e-9 no noise brings its ε to 0.001."""
    with pytest.raises(ConfigurationError, match=r"unreachable.*no epsilon below 0\.0\d+"):
        accounting.noise_multiplier(
            target_epsilon=1e-3, delta=1e-9, sample_rate=0.01, steps=100, accountant="rdp"
        )


def test_unreachable_steps_name_the_cost_of_one():
    with pytest.raises(ConfigurationError, match=r"a single step costs epsilon=4\.3"):
        accounting.steps(
            target_epsilon=1.0,
            delta=1e-5,
            sample_rate=1.0,
            noise_multiplier=1.0,
            accountant="exact",
        )


def test_unreachable_rate_without_noise():
    with pytest.raises(ConfigurationError, match="unreachable"):
        accounting.sample_rate(target_epsilon=1.0, delta=1e-5, noise_multiplier=0.0, steps=10)


def test_no_noise_is_infinite_and_no_steps_are_free():
    run = {"sample_rate": 0.01, "delta": 1e-5}
    assert accounting.epsilon(noise_multiplier=0.0, steps=10, **run) == math.inf
    assert accounting.epsilon(noise_multiplier=0.0, steps=0, **run) == 0.0


@pytest.mark.parametrize("adjacency", ["zero-out", "replace-one"])
@pytest.mark.parametrize("target", [1e-9, 9e-5])
def test_a_tiny_target_is_met_at_once(target, adjacency):
    """`pld` bounds δ(0) in closed form there: safe by `exact`, and no more than twice too much."""
    question = {"sample_rate": 0.256, "steps": 80, "delta": 1e-6, "adjacency": adjacency}
    sigma = accounting.noise_multiplier(target_epsilon=target, **question)
    assert accounting.epsilon(noise_multiplier=sigma, **question) <= target
    run = {"sample_rate": 0.256, "steps": 80, "adjacency": adjacency, "accountant": "exact"}
    assert accounting.delta(epsilon=0.0, noise_multiplier=sigma, **run) <= 1e-6
    assert accounting.delta(epsilon=0.0, noise_multiplier=sigma / 2, **run) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "steps"), [(0.05, 200), (0.256, 80), (1.0, 10), (0.1, 1)])
@pytest.mark.parametrize("target", [1e-3, 1e-4, 1e-6])
def test_exact_calibrates_to_tiny_targets(target, rate, steps):
    question = {"sample_rate": rate, "steps": steps, "delta": 1e-6, "accountant": "exact"}
    sigma = accounting.noise_multiplier(target_epsilon=target, **question)
    assert accounting.epsilon(noise_multiplier=sigma, **question) <= target
    assert accounting.epsilon(noise_multiplier=sigma * 0.99, **question) > target


def test_pld_is_closed_form_without_sampling():
    question = {"sample_rate": 1.0, "steps": 10, "delta": 1e-6, "target_epsilon": 1e-5}
    exact, pld = (accounting.noise_multiplier(accountant=a, **question) for a in ("exact", "pld"))
    assert exact <= pld * (1 + 1e-7) <= exact * (1 + 1e-5)
