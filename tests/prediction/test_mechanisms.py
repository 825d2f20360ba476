"""Sensitivity and noise of every way to answer, by brute force, with broken twins."""

import math

import numpy as np
import pytest
import torch
from tests.prediction.setup import K, ensemble, predictor, rows

from dptorch.plan.prediction_plan import ANSWERS
from dptorch.prediction import MECHANISMS, mechanisms
from dptorch.prediction.bounded import NORMS
from dptorch.prediction.mechanisms import sensitivity_of

NORM_OF = {
    "gaussian": "l2",
    "laplace": "l1",
    "noisy-max": "max",
    "gnmax": "l2",
    "confident-gnmax": "l2",
}
MODELS = 5


def extremes(rng):
    """Logits that a changed model might give: huge, tiny, one-hot, balanced, not finite."""
    hot = 1e9 * np.eye(K)
    pairs = [hot[0] - hot[1], hot[1] - hot[0], hot[0] + hot[1] - hot[2] - hot[3]]
    odd = [np.full(K, np.nan), np.array([np.inf, 0, 0, 0]), np.zeros(K), np.full(K, 1e300)]
    return [*hot, *-hot, *pairs, *(-p for p in pairs), *odd, *rng.normal(size=(50, K)) * 100]


def largest_move(mechanism):
    """How far one of the models moves the combined outputs at most, over many pairs of outputs."""
    made = predictor(mechanism, MODELS)
    rng = np.random.default_rng(0)
    rest = rng.normal(size=(MODELS - 1, 1, K))
    combined = np.stack(
        [
            MECHANISMS[mechanism].combine(np.concatenate([[[one]], rest]), made.plan)[0]
            for one in extremes(rng)
        ]
    )
    moves = combined[:, None] - combined[None]
    return float(NORMS[NORM_OF[mechanism]](moves).max()), made.plan


@pytest.mark.parametrize("mechanism", [name for name in ANSWERS if name != "mixing"])
def test_the_sensitivity_is_reached_and_not_exceeded(mechanism):
    move, plan = largest_move(mechanism)
    assert move <= sensitivity_of(plan) * (1 + 1e-9)
    assert move >= sensitivity_of(plan) * (1 - 1e-9)


def test_the_check_of_agreement_moves_by_one_vote():
    for before in ([3, 1, 1, 0], [5, 0, 0, 0], [2, 2, 1, 0]):
        for loses in range(K):
            for gains in range(K):
                if before[loses]:
                    after = np.array(before)
                    after[loses] -= 1
                    after[gains] += 1
                    assert abs(after.max() - max(before)) <= 1


@pytest.mark.parametrize("wrong", ["one ball instead of two", "one model instead of m"])
def test_a_wrong_sensitivity_would_be_caught(wrong):
    """Broken twins: a model's outputs are taken to be B apart at most, or m is forgotten."""
    move, plan = largest_move("gaussian")
    twin = plan.clip / plan.models if wrong.startswith("one ball") else 2 * plan.clip
    assert not twin * (1 - 1e-9) <= move <= twin * (1 + 1e-9)


N = 100_000


def events_of(mechanism, of, seed, scale):
    """For many draws of one answer: whether some event happened, one column each."""
    made = predictor(mechanism, 2, queries=1, budget=(1.0, 1e-3), of=of, seed=seed)
    combined = np.repeat(made._combined(rows(1)), N, axis=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanisms, "scale_of", lambda plan: scale * SCALE(plan))
        released = made._mechanism.release(combined, made.plan, made._draws)
    if released.scores is None:
        return np.stack([released.labels == label for label in range(K)], 1)
    projected = released.scores[:, 0] - released.scores[:, 1]
    return np.stack([projected > t for t in np.linspace(-20, 20, 41)], 1)


SCALE = mechanisms.scale_of
NEIGHBOURS = (ensemble(2, [9.0, -9.0, 0, 0]), ensemble(2, [-9.0, 9.0, 0, 0]))


def violation(mechanism, scale=1.0):
    """The largest P(event) - e^ε P'(event) - δ, less three standard errors."""
    p, q = (events_of(mechanism, of, seed, scale).mean(0) for seed, of in enumerate(NEIGHBOURS))
    worst = -math.inf
    for one, other in ((p, q), (q, p)):
        error = np.sqrt((one * (1 - one) + math.e**2 * other * (1 - other)) / N)
        worst = max(worst, float((one - math.e * other - 1e-3 - 3 * error).max()))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace", "noisy-max", "gnmax"])
def test_the_answers_of_neighbours_differ_by_no_more_than_epsilon(mechanism):
    assert violation(mechanism) <= 0


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace", "noisy-max"])
def test_a_third_of_the_noise_would_be_caught(mechanism):
    assert violation(mechanism, scale=1 / 3) > 0


def test_the_noise_has_the_scale_of_the_plan():
    made = predictor("gaussian", 4, queries=5000, budget=(8.0, 1e-5))
    scores = made.predict(rows(5000)).scores.numpy()
    wanted = made.plan.noise * 2 * 1.0 / 4
    assert (scores - scores.mean(0)).std() == pytest.approx(wanted, rel=0.02)


def test_confident_answers_only_where_models_agree():
    split = [*ensemble(40), *ensemble(40, *[[0.0, 9.0, 0, 0]] * 40)]
    agreed = predictor("confident-gnmax", 80, 10, of=ensemble(80), budget=(20.0, 1e-5))
    mixed = predictor("confident-gnmax", 80, 10, of=split, threshold=75.0, budget=(20.0, 1e-5))
    assert (agreed.predict(rows(10)).labels == 0).all()
    assert (mixed.predict(rows(10)).labels == -1).all()
    assert mixed.account.spent == pytest.approx(0.5)  # the checks alone
    assert agreed.account.spent == pytest.approx(1.0)
    assert agreed.remaining == 0
    assert mixed.remaining == 5


def test_a_plain_majority_is_found_among_many_models():
    made = predictor("gnmax", 400, 10, budget=(8.0, 1e-5))
    assert (made.predict(rows(10)).labels == torch.zeros(10)).all()


def mixtures(noise, models=3, **change):
    """The largest ratio of two neighbours' mixtures, over extreme outputs of one model."""
    made = predictor("mixing", models, queries=None, noise=noise, budget=(50.0, 1e-5))
    rng, worst = np.random.default_rng(0), 0.0
    for public in (rng.normal(size=K), np.array([9.0, 0.0, 0.0, -9.0]), np.zeros(K)):
        for rest in (np.eye(K)[:1] * -1e3, rng.normal(size=(1, K)), np.eye(K)[1:2] * 1e3):
            found = [
                MECHANISMS["mixing"].combine(
                    np.stack([public[None], one[None], *[rest] * (models - 1)]), made.plan
                )
                for one in extremes(rng)
            ]
            combined = np.concatenate(found)
            np.testing.assert_allclose(np.exp(combined).sum(-1), 1.0, rtol=1e-9)
            worst = max(worst, float((combined[:, None] - combined[None]).max()))
    return worst


@pytest.mark.parametrize("noise", [0.05, 0.5, 2.0])
def test_mixtures_of_neighbours_differ_by_no_more_than_epsilon(noise):
    found = mixtures(noise)
    assert found <= noise * (1 + 1e-9)
    assert found >= 0.9 * noise


@pytest.mark.parametrize("wrong", ["one model instead of m", "two sides for one"])
def test_a_wrong_radius_would_be_caught(monkeypatch, wrong):
    """Broken twins: the other models are not counted upon, or β is taken for the whole ratio."""
    right = mechanisms.radius_of
    twins = {
        "one model instead of m": lambda plan: 0.5 * plan.noise,
        "two sides for one": lambda plan: 2 * right(plan),
    }
    monkeypatch.setattr(mechanisms, "radius_of", twins[wrong])
    assert not 0.95 * 0.5 <= mixtures(0.5) <= 0.5 * (1 + 1e-9)


def test_more_models_may_be_further_from_the_public_one():
    far = {}
    for models in (2, 20, 200):
        made = predictor("mixing", models, 50)
        far[models] = float(np.exp(made._combined(rows(1)))[0, 0])
    public = float(torch.tensor([1.0, 0.5, 0.0, 0.0]).softmax(0)[0])
    assert public < far[2] < far[20] < far[200] < 1.0


def test_labels_are_drawn_from_the_mixture():
    made = predictor("mixing", 20, 4000)
    wanted = np.exp(made._combined(rows(1)))[0]
    drawn = np.bincount(made.predict(rows(4000)).labels.numpy(), minlength=K) / 4000
    np.testing.assert_allclose(drawn, wanted, atol=0.03)
