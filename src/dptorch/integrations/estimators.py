"""Estimators with scikit-learn's conventions, trained with differential privacy.

    from dptorch.integrations.estimators import DPClassifier

    model = DPClassifier(epsilon=3.0, bounds=(0.0, 16.0)).fit(X, y)
    model.predict(X_new), model.score(X_new, y_new)
    print(model.statement_)

They pass scikit-learn's own `check_estimator`. The one tag that they need says that on the tiny data
sets of these checks noise may leave little accuracy (`poor_score`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError, warn
from dptorch.plan import make_plan
from dptorch.training.data import Examples
from dptorch.training.hyperparameters import for_own_data
from dptorch.training.models import build_model
from dptorch.training.table_data import scale_target
from dptorch.training.table_tasks import Regression
from dptorch.training.task import Classification, Task

__all__ = ["DPClassifier", "DPRegressor"]

_PHYSICAL = 2048
_EVALUATED = 4096

Bounds = tuple[float, float] | Sequence[Any] | None


class _PrivateEstimator(BaseEstimator):  # type: ignore[misc]
    """What both estimators share: scaling by public bounds, and one private run in `fit`."""

    def __init__(
        self,
        *,
        epsilon: float = 3.0,
        delta: float | None = None,
        bounds: Bounds = None,
        model: str = "mlp",
        epochs: float | None = None,
        sample_rate: float | None = None,
        noise_multiplier: float | None = None,
        learning_rate: float | None = None,
        momentum: float | None = None,
        max_grad_norm: float | None = None,
        random_state: Any = None,
    ) -> None:
        self.epsilon = epsilon
        self.delta = delta
        self.bounds = bounds
        self.model = model
        self.epochs = epochs
        self.sample_rate = sample_rate
        self.noise_multiplier = noise_multiplier
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.max_grad_norm = max_grad_norm
        self.random_state = random_state

    def _fit(
        self,
        x: NDArray[Any],
        labels: Tensor,
        outputs: int,
        task: Task,
        groups: Any,
        read: list[str],
    ) -> None:
        """Train on float features [N, D] and labels [N]."""
        self._low, self._high = self._ranges(x, read)
        seed = None
        if self.random_state is not None:
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
            torch.manual_seed(seed)
        features = self._features(x)
        suggested = for_own_data(tuple(features.shape[1:]))[1]
        users = None if groups is None else list(np.asarray(groups).tolist())
        size = len(features) if users is None else len(set(users))
        person = {} if users is None else {"unit": "user", "max_examples_per_user": 1}

        def chosen(name: str) -> Any:
            value = getattr(self, name)
            return getattr(suggested, name) if value is None else value

        budget = {"target_epsilon": self.epsilon}
        if self.noise_multiplier is not None:
            budget = {"noise_multiplier": self.noise_multiplier}
        plan = make_plan(
            sample_size=size,
            sample_rate=chosen("sample_rate"),
            epochs=chosen("epochs"),
            target_delta=self.delta,
            max_grad_norm=chosen("max_grad_norm"),
            **budget,  # type: ignore[arg-type]
            **person,  # type: ignore[arg-type]
        )
        network = build_model(self.model, tuple(features.shape[1:]), outputs)
        engine = PrivacyEngine(network, plan=plan, seed=seed)
        optimizer = engine.attach(
            torch.optim.SGD(
                network.parameters(), lr=chosen("learning_rate"), momentum=chosen("momentum")
            )
        )
        loader = engine.loader(
            Examples(features, labels), user_ids=users, max_physical_batch_size=_PHYSICAL
        )
        cpu = torch.device("cpu")
        while not engine.exhausted:
            for batch in loader:
                loss, _ = task.loss(network, batch, cpu)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        # A copy without the engine's hooks, which can be pickled.
        self.network_ = build_model(self.model, tuple(features.shape[1:]), outputs)
        self.network_.load_state_dict(network.state_dict())
        self.network_.eval()
        self.statement_ = _statement(engine, read)
        self.n_iter_ = engine.steps_done

    def _ranges(self, x: NDArray[Any], read: list[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(low, high) of each feature [D]."""
        if self.bounds is None:
            warn(
                "bounds=None: the range of each feature is read off the private data, which no noise "
                "covers. The statement says so. Give bounds=(low, high), as the features' meaning "
                "tells."
            )
            read.append("bounds of the features")
            low, high = x.min(0), x.max(0)
            return low, np.where(high > low, high, low + 1)
        found = np.asarray(self.bounds, dtype=np.float64)
        if found.shape == (2,):
            found = np.repeat(found[:, None], x.shape[1], axis=1)
        if found.shape != (2, x.shape[1]) or not (found[0] < found[1]).all():
            raise ConfigurationError(
                f"bounds={self.bounds!r}: expected (low, high), or a low and a high for each of the "
                f"{x.shape[1]} features, shape (2, {x.shape[1]}), low < high."
            )
        return found[0], found[1]

    def _features(self, x: NDArray[Any]) -> Tensor:
        """Features clipped to their bounds and scaled to [-1, 1], float32 [N, D]."""
        scaled = (np.clip(x, self._low, self._high) - self._low) * (
            2 / (self._high - self._low)
        ) - 1
        return torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))

    def _outputs(self, x: Any) -> Tensor:
        """What the network gives for new rows: float32 [N, outputs]."""
        check_is_fitted(self)
        array = validate_data(self, x, reset=False, dtype=np.float64)
        network: nn.Module = self.network_
        with torch.no_grad():
            # One size of batch always: the last bit may depend on the number of rows.
            parts = [
                network(torch.cat([part, part.new_zeros(_EVALUATED - len(part), part.shape[1])]))[
                    : len(part)
                ]
                for part in self._features(array).split(_EVALUATED)
            ]
        return torch.cat(parts)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags


class DPClassifier(ClassifierMixin, _PrivateEstimator):  # type: ignore[misc]
    """A classifier trained with differential privacy, with scikit-learn's conventions.

    Args:
        epsilon, delta: the budget; δ is 1 / (10 N), at most 1e-5, as a power of ten.
        bounds: (low, high) of all features, or two rows of one for each. Public: from what the features
            mean. None reads them off the data, warns, and says so in the statement.
        model: a name that `dptorch.training.models.build_model` knows: mlp, linear, your own.
        epochs, sample_rate, learning_rate, momentum, max_grad_norm: see `dptorch train`; None is what
            it suggests for a table.
        noise_multiplier: instead of `epsilon`.
        random_state: for tests. A run with one is repeatable, and not private.

    Attributes:
        classes_: read off the labels; public.
        statement_: the privacy statement, a `dptorch.Statement`.
        network_: the trained network, which takes scaled features.

    Example:
        >>> X = np.random.default_rng(0).random((400, 2))
        >>> y = np.where(X[:, 0] > 0.5, "yes", "no")
        >>> model = DPClassifier(noise_multiplier=1.0, epochs=5, bounds=(0, 1), random_state=0)
        >>> model = model.fit(X, y)
        >>> model.predict([[0.9, 0.5], [0.1, 0.5]]).tolist()
        ['yes', 'no']
    """

    def fit(self, X: Any, y: Any, groups: Any = None) -> DPClassifier:
        """Train, and spend the budget.

        Args:
            X: features [N, D].
            y: classes [N].
            groups: whose each row is [N]; ε then protects a person with all their rows.
        """
        x, labels = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ConfigurationError(
                f"y has one class, {self.classes_[0]!r}, and a classifier needs at least two classes."
            )
        read = ["the classes"]
        code = torch.from_numpy(codes.astype(np.int64))
        self._fit(x, code, len(self.classes_), Classification(), groups, read)
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True
        return tags

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Estimate the probability of each class, [N, classes]."""
        return np.asarray(torch.softmax(self._outputs(X).double(), dim=1).numpy())

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict the class of each row, [N]."""
        chosen = self._outputs(X).argmax(1).numpy()
        return np.asarray(self.classes_[chosen])


class DPRegressor(RegressorMixin, _PrivateEstimator):  # type: ignore[misc]
    """A regressor trained with differential privacy; see `DPClassifier`.

    Args:
        target_bounds: (low, high) of the target, public. None reads them off the data, warns, and says
            so in the statement.

    Example:
        >>> X = np.random.default_rng(0).random((400, 1))
        >>> model = DPRegressor(noise_multiplier=1.0, epochs=10, bounds=(0, 1), target_bounds=(0, 10),
        ...                     model="linear", learning_rate=0.3, random_state=0).fit(X, 10 * X[:, 0])
        >>> bool(abs(model.predict([[0.5]])[0] - 5) < 1)
        True
    """

    def __init__(
        self,
        *,
        epsilon: float = 3.0,
        delta: float | None = None,
        bounds: Bounds = None,
        target_bounds: tuple[float, float] | None = None,
        model: str = "mlp",
        epochs: float | None = None,
        sample_rate: float | None = None,
        noise_multiplier: float | None = None,
        learning_rate: float | None = None,
        momentum: float | None = None,
        max_grad_norm: float | None = None,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            epsilon=epsilon,
            delta=delta,
            bounds=bounds,
            model=model,
            epochs=epochs,
            sample_rate=sample_rate,
            noise_multiplier=noise_multiplier,
            learning_rate=learning_rate,
            momentum=momentum,
            max_grad_norm=max_grad_norm,
            random_state=random_state,
        )
        self.target_bounds = target_bounds

    def fit(self, X: Any, y: Any, groups: Any = None) -> DPRegressor:
        """Train, and spend the budget; see `DPClassifier.fit`."""
        x, targets = validate_data(
            self, X, y, dtype=np.float64, ensure_min_samples=2, y_numeric=True
        )
        read: list[str] = []
        if self.target_bounds is None:
            warn(
                "target_bounds=None: the range of the target is read off the private data, which no "
                "noise covers. The statement says so. Give target_bounds=(low, high)."
            )
            read.append("bounds of the target")
            low, high = float(targets.min()), float(targets.max())
            high = high if high > low else low + 1
        else:
            low, high = map(float, self.target_bounds)
            if not low < high:
                raise ConfigurationError(
                    f"target_bounds={self.target_bounds!r}: expected (low, high), low < high."
                )
        self._target = (low, high)
        scaled = scale_target(torch.from_numpy(targets.astype(np.float64)), self._target)
        self._fit(x, scaled, 1, Regression(self._target), groups, read)
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True
        return tags

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Predict the target of each row, [N], within its bounds."""
        low, high = self._target if hasattr(self, "_target") else (0.0, 1.0)
        scaled = self._outputs(X)[:, 0].double().clamp(-1, 1).numpy()
        return np.asarray(low + (scaled + 1) * ((high - low) / 2))


def _statement(engine: PrivacyEngine, read: list[str]) -> Any:
    from dataclasses import replace

    return replace(engine.statement(), read_from_data=tuple(read))
