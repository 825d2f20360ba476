"""Estimators: scikit-learn's own checks, real data, and a guarantee that is the engine's."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils.estimator_checks import check_estimator

from dptorch.errors import ConfigurationError, PrivacyWarning
from dptorch.integrations.estimators import DPClassifier, DPRegressor

QUICK: dict[str, Any] = {
    "noise_multiplier": 1.0, "epochs": 1, "sample_rate": 0.5, "model": "linear"
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
@pytest.mark.parametrize("estimator", [DPClassifier, DPRegressor])
def test_scikit_learns_own_checks(estimator: Any) -> None:
    found = check_estimator(estimator(**QUICK), on_fail=None, on_skip=None)
    assert len(found) >= 50
    failed = {r["check_name"]: r["exception"] for r in found if r["status"] == "failed"}
    assert failed == {}
    # Skipped by scikit-learn: without a seed a private estimator is not deterministic.
    skipped = {r["check_name"] for r in found if r["status"] == "skipped"}
    assert skipped <= {
        "check_array_api_input", "check_fit_idempotent", "check_methods_sample_order_invariance",
        "check_methods_subset_invariance", "check_pipeline_consistency",
        "check_positive_only_tag_during_fit",
    }  # fmt: skip


@pytest.mark.slow
def test_digits_and_tumours_at_epsilon_3() -> None:
    """Without privacy logistic regression reaches 96 % and 97 % on these splits."""
    X, y = load_digits(return_X_y=True)
    split = train_test_split(X, y, random_state=0, stratify=y)
    model = DPClassifier(epsilon=3.0, bounds=(0, 16), random_state=0).fit(split[0], split[2])
    assert model.score(split[1], split[3]) > 0.9
    X, y = load_breast_cancer(return_X_y=True)
    # What the features can be, in round numbers.
    high = [30, 40, 200, 2600, 0.2, 0.4, 0.5, 0.25, 0.35, 0.1, 3, 5, 25, 550, 0.035, 0.15, 0.4, 0.06,
            0.08, 0.03, 40, 50, 260, 4300, 0.25, 1.1, 1.3, 0.3, 0.7, 0.25]  # fmt: skip
    split = train_test_split(X, y, random_state=0, stratify=y)
    model = DPClassifier(epsilon=3.0, bounds=([0] * 30, high), random_state=0)
    assert model.fit(split[0], split[2]).score(split[1], split[3]) > 0.9
    assert model.statement_.epsilon <= 3.0
    assert not model.statement_.private, "a run with a random_state protects nobody"


def blobs() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    return rng.normal(size=(300, 3)) + 3 * y[:, None], np.array(["no", "yes"])[y]


def test_a_private_fit_says_what_it_guarantees() -> None:
    X, y = blobs()
    model = DPClassifier(noise_multiplier=2.0, epochs=2, bounds=(-3, 6)).fit(X, y)
    assert model.statement_.private
    assert model.statement_.read_from_data == ("the classes",)
    assert model.statement_.steps == model.n_iter_ == 8
    assert "the classes" in str(model.statement_)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    assert np.array_equal(model.predict_proba(X[:5]), model.predict_proba(X)[:5])


def test_ranges_that_were_read_off_the_data_are_said() -> None:
    X, y = blobs()
    with pytest.warns(PrivacyWarning, match="range of each feature is read off"):
        model = DPClassifier(**QUICK).fit(X, y)
    assert "bounds of the features" in model.statement_.read_from_data
    with pytest.warns(PrivacyWarning, match="range of the target is read off"):
        regressor = DPRegressor(**QUICK, bounds=(-3, 6)).fit(X, X[:, 0])
    assert regressor.statement_.read_from_data == ("bounds of the target",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DPRegressor(**QUICK, bounds=(-3, 6), target_bounds=(-3, 6)).fit(X, X[:, 0])


@pytest.mark.parametrize("model", ["mlp", "linear"])
def test_a_default_of_float64_changes_no_estimator(model: str) -> None:
    X, y = blobs()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        settings = QUICK | {"bounds": (-3, 6), "model": model}
        classifier = DPClassifier(**settings).fit(X, y)
        regressor = DPRegressor(**settings, target_bounds=(-3, 6)).fit(X, X[:, 0])
        assert torch.get_default_dtype() == torch.float64
        found = classifier.predict_proba(X), regressor.predict(X)
    finally:
        torch.set_default_dtype(before)
    np.testing.assert_array_equal(found[0], classifier.predict_proba(X))
    np.testing.assert_array_equal(found[1], regressor.predict(X))


def test_groups_are_the_unit() -> None:
    X, y = blobs()
    model = DPClassifier(**QUICK, bounds=(-3, 6)).fit(X, y, groups=np.arange(300) // 3)
    plan = model.statement_.plan
    assert (plan.unit, plan.sample_size, plan.max_examples_per_user) == ("user", 100, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": (1, 0)}, "low < high"),
        ({"bounds": ([0, 0], [1, 1])}, r"shape \(2, 3\)"),
        ({"bounds": (0, 1), "model": "mpl"}, "Did you mean 'mlp'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DPClassifier(**QUICK | settings).fit(*blobs())
    with pytest.raises(ConfigurationError, match="one class"):
        DPClassifier(**QUICK, bounds=(0, 1)).fit(blobs()[0], np.zeros(300))
    with pytest.raises(ConfigurationError, match="target_bounds"):
        DPRegressor(**QUICK, bounds=(0, 1), target_bounds=(1, 1)).fit(blobs()[0], np.zeros(300))
