"""Measure how well members and non-members are told apart by their features.

What is chosen (the kind of attack model, its settings, the threshold) is chosen by cross-validation
inside one part of the records; the other part is scored once, at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dptorch.audit.evidence import Array, Evidence
from dptorch.audit.roc import auc_interval, tpr_at_fpr
from dptorch.errors import ConfigurationError, DataError, one_of

__all__ = ["FEWEST_RECORDS", "MODELS", "attack_features", "blind_auc", "evidence_of"]

MODELS = ("Random Forest", "Logistic Regression", "Neural Network", "Stacking Ensemble")
FEWEST_RECORDS = 10
_FOLDS = 3
_KEPT_FEATURES = 20
_TREES = 100


@dataclass(frozen=True)
class _Family:
    """One kind of attack model: the estimator and the settings that are tried."""

    estimator: Any
    settings: Mapping[str, Sequence[Any]]


def _families(names: Sequence[str], seed: int) -> dict[str, _Family]:
    try:
        from sklearn.ensemble import RandomForestClassifier, StackingClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise ConfigurationError(
            "membership inference needs scikit-learn: pip install 'dptorch[audit]'."
        ) from error
    forest = RandomForestClassifier(n_estimators=_TREES, min_samples_leaf=5, random_state=seed)
    linear = LogisticRegression(max_iter=1000)
    every = {
        "Random Forest": _Family(forest, {"min_samples_leaf": (3, 10)}),
        "Logistic Regression": _Family(linear, {"C": (0.01, 0.3)}),
        "Neural Network": _Family(
            MLPClassifier((32,), max_iter=300, random_state=seed), {"alpha": (0.1, 3.0)}
        ),
        "Stacking Ensemble": _Family(
            StackingClassifier(
                [("forest", forest), ("linear", LogisticRegression(C=0.1, max_iter=1000))],
                LogisticRegression(),
                cv=_FOLDS,
            ),
            {},
        ),
    }
    return {one_of("model", name, MODELS): every[name] for name in names}


def attack_features(
    features: Array,
    labels: Array,
    *,
    names: Sequence[str] | None = None,
    models: Sequence[str] = MODELS,
    test_share: float = 0.3,
    permutations: int = 20,
    seed: int = 42,
) -> tuple[dict[str, Any], Evidence]:
    """Tell members from others by their features.

    Records are split once, stratified. In the first part, each kind of attack model is searched by
    cross-validation inside cross-validation; the kind with the best mean AUC of the outer folds is
    fitted again, and the threshold of the best F1 is read off the outer folds' predictions. The other
    part is scored once.

    Args:
        features: [N, D]; NaN is filled with the median.
        labels: [N], 1 for members.
        names: of the features.
        models: which of `MODELS` to try.
        test_share: of the records, kept untouched.
        permutations: how often everything is repeated with permuted labels, settings kept.
        seed: of the split and the models.

    Returns:
        the result, see `LanguageMIA`, and the scores of the untouched part.

    Raises:
        DataError: fewer than 10 members or non-members.
        ConfigurationError: scikit-learn is missing, or an unknown model.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = np.arange(120) % 2
        >>> result, scores = attack_features(rng.normal(size=(120, 3)) + labels[:, None], labels,
        ...     models=("Logistic Regression",), permutations=2)
        >>> result["roc_auc"] > 0.7, len(scores) == result["n_samples"] == 36
        (True, True)
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split

    features, labels = np.asarray(features, float), np.asarray(labels).astype(int)
    members, others = int((labels == 1).sum()), int((labels == 0).sum())
    if min(members, others) < FEWEST_RECORDS:
        raise DataError(
            f"{members} members and {others} non-members are left to tell apart. At least "
            f"{FEWEST_RECORDS} of each are needed, and hundreds for a number worth reading."
        )
    names = [f"feature_{i}" for i in range(features.shape[1])] if names is None else list(names)
    # An infinite loss is filled in too: scikit-learn refuses infinity.
    features = np.where(np.isfinite(features), features, np.nan)
    # Over all records, as it sees no label.
    live = [j for j in range(features.shape[1]) if np.unique(features[:, j]).size > 1]
    kept, names = features[:, live], [names[j] for j in live]
    if not live:
        kept, names = np.zeros((len(labels), 1)), ["nothing"]
    dev, test = train_test_split(
        np.arange(len(labels)), test_size=test_share, stratify=labels, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        best, fitted, threshold = _select(kept[dev], labels[dev], models, seed)
        scores = fitted.predict_proba(kept[test])[:, 1]
        null = _null_aucs(fitted, kept, labels, dev, test, permutations, seed)
        importance = _importance(fitted, kept[test], labels[test], names, seed)
    evidence = Evidence(scores, labels[test] == 1)
    result = _result(evidence, best, threshold, importance)
    observed = result["roc_auc"]
    result["null_auc"] = float(np.mean(null)) if len(null) else float("nan")
    # The real labels are one of the permutations: without the 1 a p-value could be 0.
    result["p_value"] = float((1 + np.sum(np.asarray(null) >= observed)) / (1 + len(null)))
    return result, evidence


def _pipeline(estimator: Any, width: int) -> Any:
    from sklearn.feature_selection import SelectKBest
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = [SimpleImputer(strategy="median"), StandardScaler()]
    if width > _KEPT_FEATURES:
        steps.append(SelectKBest(k=_KEPT_FEATURES))
    return make_pipeline(*steps, estimator)


def _select(x: Array, y: Array, models: Sequence[str], seed: int) -> tuple[str, Any, float]:
    """(name, fitted model, threshold) of the kind that does best in the outer folds."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    outer = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    inner = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed + 1)
    best: tuple[float, str, Any, Array] | None = None
    for name, family in _families(models, seed).items():
        pipeline = _pipeline(family.estimator, x.shape[1])
        prefix = pipeline.steps[-1][0]
        grid = {f"{prefix}__{key}": list(values) for key, values in family.settings.items()}
        search = GridSearchCV(pipeline, grid, scoring="roc_auc", cv=inner) if grid else pipeline
        predicted = np.zeros(len(y))
        found = []
        for fit, hold in outer.split(x, y):
            search.fit(x[fit], y[fit])
            predicted[hold] = search.predict_proba(x[hold])[:, 1]
            found.append(roc_auc_score(y[hold], predicted[hold]))
        if best is None or np.mean(found) > best[0]:
            best = float(np.mean(found)), name, search, predicted
    assert best is not None
    _, name, search, predicted = best
    search.fit(x, y)
    return name, getattr(search, "best_estimator_", search), _best_f1_threshold(predicted, y)


def _best_f1_threshold(scores: Array, labels: Array) -> float:
    """The score at or above which "member" gives the highest F1."""
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(labels[order])
    said = np.arange(1, len(labels) + 1)
    # 2 TP / (2 TP + FP + FN), since TP + FP is what was said and TP + FN are the members.
    f1 = 2 * right / (said + labels.sum())
    # No threshold parts equal scores.
    last_of_ties = np.append(np.diff(scores[order]) != 0, True)
    return float(scores[order][int(np.argmax(np.where(last_of_ties, f1, -1.0)))])


def _null_aucs(
    fitted: Any, x: Array, y: Array, dev: Array, test: Array, repeats: int, seed: int
) -> list[float]:
    """AUCs of the chosen model, fitted and scored on permuted labels."""
    from sklearn.base import clone
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    found = []
    for _ in range(repeats):
        # Within each part, so that both keep their numbers of members.
        fit, hold = rng.permutation(y[dev]), rng.permutation(y[test])
        model = clone(fitted).fit(x[dev], fit)
        found.append(float(roc_auc_score(hold, model.predict_proba(x[test])[:, 1])))
    return found


def _importance(
    model: Any, x: Array, y: Array, names: Sequence[str], seed: int
) -> dict[str, float]:
    """How much AUC is lost when a feature is shuffled among the untouched records."""
    from sklearn.inspection import permutation_importance

    lost = permutation_importance(model, x, y, scoring="roc_auc", n_repeats=3, random_state=seed)
    order = np.argsort(-lost.importances_mean, kind="stable")
    return {names[j]: float(lost.importances_mean[j]) for j in order}


def _result(
    evidence: Evidence, best: str, threshold: float, importance: dict[str, float]
) -> dict[str, Any]:
    from sklearn import metrics

    scores, truth = np.asarray(evidence.scores), np.asarray(evidence.member).astype(int)

    def decided(at: float, suffix: str) -> dict[str, float]:
        said = (scores >= at).astype(int)
        kind = {"zero_division": 0.0}
        return {
            f"accuracy_{suffix}": float(metrics.accuracy_score(truth, said)),
            f"precision_{suffix}": float(metrics.precision_score(truth, said, **kind)),
            f"recall_{suffix}": float(metrics.recall_score(truth, said, **kind)),
            f"f1_{suffix}": float(metrics.f1_score(truth, said, **kind)),
        }

    low, high = auc_interval(evidence)
    return {
        "roc_auc": float(metrics.roc_auc_score(truth, scores)),
        "precision_recall_auc": float(metrics.average_precision_score(truth, scores)),
        "brier_score": float(metrics.brier_score_loss(truth, scores)),
        "best_model": best,
        "optimal_threshold": threshold,
        "feature_importance": importance,
        **decided(0.5, "standard"),
        **decided(threshold, "optimal"),
        "n_samples": len(truth),
        "n_positive": int(truth.sum()),
        "n_negative": int((1 - truth).sum()),
        "roc_auc_ci": (low, high),
        "tpr_at_fpr": {rate: tpr_at_fpr(evidence, rate) for rate in (0.01, 0.001, 0.0)},
    }


def evidence_of(model: Any, x: Any, labels: Array, seed: int = 0) -> Evidence:
    """Out-of-fold scores of a scikit-learn model."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    scores = cross_val_predict(model, x, labels, cv=folds, method="decision_function")
    return Evidence(scores, np.asarray(labels) == 1)


def blind_auc(model: Any, x: Any, labels: Array) -> tuple[float, tuple[float, float]]:
    """AUC, with interval, of a classifier that sees the records and not the audited model.

    Above one half, members and non-members differ by themselves: they come from different
    distributions, and an attack that tells them apart says nothing about the audited model (Meeus et
    al. 2024, arXiv:2406.17975).
    """
    from dptorch.audit.roc import auc

    evidence = evidence_of(model, x, labels)
    return auc(evidence), auc_interval(evidence)
