"""PrivatePredictor: answers to queries, with a budget that they cannot overspend."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dptorch.accounting import Adjacency
from dptorch.errors import BudgetExhausted, ConfigurationError
from dptorch.ledger.datasets import DatasetLedger
from dptorch.ledger.queries import refuse_overspending
from dptorch.noise.draws import Draws
from dptorch.plan import PrivacySpent
from dptorch.plan.prediction_plan import PredictionPlan
from dptorch.prediction.accounts import Account, MemoryAccount
from dptorch.prediction.mechanisms import (
    MECHANISMS,
    NO_LABEL,
    Mixing,
    NoisyAnswers,
    Votes,
    scale_of,
)
from dptorch.prediction.statement import PredictionStatement, covered_by
from dptorch.prediction.together import smooth
from dptorch.randomness import RootKey
from dptorch.statement import Statement

__all__ = ["Answers", "Model", "PrivatePredictor", "refuse_bad_rows"]

Model = Callable[[Tensor], Tensor]
_ROWS_AT_ONCE: Final = 1024
_CACHED_ROWS: Final = 100_000


@dataclass(frozen=True)
class Answers:
    """What a predictor says about N inputs.

    Attributes:
        labels: int64 [N]; `dptorch.prediction.NO_LABEL` where models did not agree
            ("confident-gnmax").
        scores: float64 [N, K] logits or votes, with the noise of the mechanism; None where it releases
            labels only.
        charged: how many rows were charged; the others repeat a row that was answered before.
        source: "private", "covered" (the model was trained privately) or "public" (the public model
            that stands in once the budget is spent).
    """

    labels: Tensor
    scores: Tensor | None
    charged: int
    source: str


class PrivatePredictor:
    """Predict with models that were trained without privacy, under a privacy budget.

    Each row of a batch is one query. Its cost is charged before its noise is drawn, and an exact repeat
    of a row that was answered before gets the same answer at no cost.

    Args:
        models: one model, or m models trained on disjoint parts of the data (`train_shards`). A model
            maps [N, ...] inputs to [N, K] logits.
        mechanism: one of `dptorch.prediction.MECHANISMS`.
        clip: B, the bound on one model's logits; not for votes.
        budget: (ε, δ) of all answers together. None only where `trained_with` covers the model.
        queries: how many answers the budget has to pay for; sets the noise.
        noise: instead of `queries`: standard deviation over the sensitivity (ε of one answer for
            "laplace" and "noisy-max"); sets the number of answers.
        ledger: of the data set that the models were trained on: answers are on disk before they are
            given, the budget is reserved under the data set's cap, and several processes share it.
            Without one the budget lives and dies with this object.
        name: of the budget in the ledger. A known name goes on where it was.
        on_exhausted: "raise", or a public model that answers once the budget is spent.
        trained_with: what shows that the one model was trained with differential privacy: an engine's
            `statement()`, or the "statement" of a run's run.json. Answers are then post-processing
            and need neither noise nor budget.
        threshold: of "confident-gnmax": how many votes a label needs, noise included.
        mix_with: of "mixing": the public model, which nothing private was used for.
        unit, adjacency: what the guarantee is for.
        seed: for tests; answers with a seed are not private.

    Guarantees:
        - All answers together are (ε, δ)-private with respect to one record of the data, however the
          inputs were chosen, if no record is in the data of two models
          (`test_the_sensitivity_is_reached_and_not_exceeded`,
          `test_the_answers_of_neighbours_differ_by_no_more_than_epsilon`).
        - An answer is charged before its noise is drawn; what cannot be charged is not answered
          (`test_charged_before_the_noise_is_drawn`).
        - Only a row of the same bytes is answered from the cache
          (`test_exact_repeats_are_free_and_near_ones_are_not`).

    Raises:
        ConfigurationError: a value out of range; no clip, budget or number of queries where one is
            needed.
        BudgetExhausted, LedgerError: the ledger does not admit the budget.

    Example:
        >>> models = [nn.Linear(4, 3) for _ in range(50)]
        >>> predictor = PrivatePredictor(models, "gnmax", budget=(8.0, 1e-5), queries=20)
        >>> answers = predictor.predict(torch.zeros(5, 4))  # one row, five times
        >>> answers.charged, predictor.remaining
        (1, 19)
    """

    def __init__(
        self,
        models: Model | Sequence[Model],
        mechanism: str = "gaussian",
        *,
        clip: float | None = None,
        budget: tuple[float, float] | None = None,
        queries: int | None = None,
        noise: float | None = None,
        ledger: DatasetLedger | None = None,
        name: str | None = None,
        on_exhausted: str | Model = "raise",
        trained_with: Statement | Mapping[str, Any] | None = None,
        threshold: float | None = None,
        mix_with: Model | None = None,
        unit: str = "example",
        adjacency: Adjacency | str = Adjacency.ZERO_OUT,
        seed: int | None = None,
    ) -> None:
        self.models = _models(models)
        self._public = _stand_in(on_exhausted)
        self.covered = None if trained_with is None else covered_by(trained_with, len(self.models))
        self._cache: OrderedDict[bytes, tuple[int, NDArray[Any] | None]] = OrderedDict()
        self._lock = threading.Lock()
        self.plan: PredictionPlan | None = None
        self._first: list[Model] = []
        if self.covered is not None:
            return
        if budget is None:
            raise ConfigurationError(
                "budget=None: a model that was trained without differential privacy needs a budget, "
                "such as (8.0, 1e-5). For one that was trained with it give trained_with."
            )
        unclipped = isinstance(MECHANISMS.get(mechanism), Votes | Mixing)
        if mechanism in MECHANISMS and unclipped != (clip is None):
            raise ConfigurationError(
                f"clip={clip!r} with mechanism={mechanism!r}: logits need a bound, such as 1.0. Votes "
                "have none, and neither has 'mixing'."
            )
        if (mechanism == "mixing") != (mix_with is not None):
            raise ConfigurationError(
                f"mix_with with mechanism={mechanism!r}: 'mixing', and no other, needs a public model."
            )
        self._first = [] if mix_with is None else _models(mix_with)
        self.plan = PredictionPlan.make(
            mechanism,
            budget,
            queries=queries,
            noise=noise,
            models=len(self.models),
            clip=clip,
            unit=unit,
            adjacency=Adjacency.of(adjacency),
            **({} if threshold is None else {"threshold": threshold}),
        )
        key = RootKey.from_os() if seed is None else RootKey.from_seed(seed)
        self.key_source = key.source
        self._draws = Draws(key)
        self._mechanism = MECHANISMS[mechanism]
        self.account: Account = (
            MemoryAccount(self.plan)
            if ledger is None
            else ledger.answers(self.plan, key.source.value, name or secrets.token_hex(8))
        )
        self.account.open()

    def predict(self, inputs: Tensor) -> Answers:
        """Answer about the rows of `inputs`, [N, ...]: all of them, or none.

        Raises:
            BudgetExhausted: the rows that are new do not fit into what is left; nothing was spent.
            LedgerError: the ledger cannot be written; nothing was answered.
            ConfigurationError: `inputs` are no rows of finite numbers.
        """
        refuse_bad_rows(inputs)
        if self.covered is not None:
            logits = self._outputs(inputs)[0]
            return Answers(
                torch.from_numpy(logits.argmax(-1)), torch.from_numpy(logits), 0, "covered"
            )
        keys = _keys(inputs)
        with self._lock:
            known = {key: self._cache[key] for key in keys if key in self._cache}
        new = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}
        rows = sorted(new.values())
        # All rows go through the models, so that the work does not tell which of them were known.
        combined = self._combined(inputs)[rows]
        try:
            released = self._release(combined)
        except BudgetExhausted:
            if self._public is None:
                raise
            logits = _numpy(self._public(inputs))
            return Answers(
                torch.from_numpy(logits.argmax(-1)), torch.from_numpy(logits), 0, "public"
            )
        for place, row in enumerate(rows):
            scores = None if released.scores is None else released.scores[place]
            known[keys[row]] = (int(released.labels[place]), scores)
        with self._lock:
            for key in new:
                self._cache[key] = known[key]
            while len(self._cache) > _CACHED_ROWS:
                self._cache.popitem(last=False)
        labels = torch.tensor([known[key][0] for key in keys], dtype=torch.int64)
        found = [known[key][1] for key in keys]
        scores_of_all = None if found[0] is None else torch.from_numpy(np.stack(found))  # type: ignore[arg-type]
        return Answers(labels, scores_of_all, len(rows), "private")

    __call__ = predict

    def predict_together(self, inputs: Tensor, features: Tensor | None = None) -> Answers:
        """Answer about many rows at once, noise averaged over rows that are alike.

        Each row is charged as by `predict`; what follows is post-processing
        (`dptorch.prediction.together`). At noise far above the scores the labels are far better.

        Args:
            inputs: [N, ...].
            features: [N, ...], what is public about the inputs, in which near ones are alike; by
                default the inputs themselves.

        Raises:
            ConfigurationError: the mechanism's noise is not normal, or it releases labels only.
            BudgetExhausted, LedgerError: as `predict`.
        """
        if self.plan is not None and self.plan.mechanism not in ("gaussian", "gnmax"):
            raise ConfigurationError(
                f"mechanism={self.plan.mechanism!r} releases no scores with normal noise to average. "
                "Use 'gnmax' or 'gaussian'."
            )
        answers = self.predict(inputs)
        if answers.source != "private":
            return answers
        assert self.plan is not None
        assert answers.scores is not None
        keys = _keys(inputs)
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        rows = sorted(first.values())
        public = _numpy((inputs if features is None else features).flatten(1))
        scores = answers.scores.numpy()
        center = 0.0 if self.plan.clip is not None else self.plan.models / scores.shape[1]
        found = smooth(public[rows], scores[rows] - center, scale_of(self.plan)) + center
        place = {row: i for i, row in enumerate(rows)}
        whole = found[[place[first[key]] for key in keys]]
        return replace(
            answers, labels=torch.from_numpy(whole.argmax(-1)), scores=torch.from_numpy(whole)
        )

    @property
    def remaining(self) -> int | None:
        """How many more answers the budget pays for; None where none is needed."""
        if self.plan is None:
            return None
        return max(0, int((1 - self.account.spent) / self.plan.share_of_one + 1e-6))

    def spent(self) -> PrivacySpent:
        """(ε, δ) of what was answered so far, by all processes that share the budget."""
        if self.plan is None:
            assert self.covered is not None
            return PrivacySpent(self.covered.epsilon, self.covered.delta)
        self.account.look()
        return PrivacySpent(self.plan.epsilon(list(self.account.history)), self.plan.target_delta)

    def statement(self) -> PredictionStatement:
        """What is guaranteed, under which assumptions, and what is not."""
        if self.plan is None:
            return PredictionStatement(None, 0, 0.0, None, None, self.covered)
        epsilon = self.spent().epsilon
        answered = sum(event.steps for event in self.account.history)
        return PredictionStatement(
            self.plan, answered, epsilon, self.key_source, self.account.name, None
        )

    def close(self) -> None:
        """Give the rest of the budget back to the data set's cap. Nothing is answered after that."""
        if self.plan is not None:
            self.account.close()

    def _release(self, combined: NDArray[Any]) -> NoisyAnswers:
        """Charge [n, K] combined outputs and add their noise."""
        plan, n = self.plan, len(combined)
        assert plan is not None
        if n == 0:
            return NoisyAnswers(np.empty(0, np.int64), combined)
        if plan.check_noise is None:
            self.account.charge([plan.event(n)])
            return self._mechanism.release(combined, plan, self._draws)
        assert isinstance(self._mechanism, Votes)
        # Whether the models agree must not decide whether the budget suffices.
        refuse_overspending(plan, self.account.spent, [plan.check_event(n), plan.event(n)])
        self.account.charge([plan.check_event(n)])
        agree = self._mechanism.agree(combined, plan, self._draws)
        labels = np.full(n, NO_LABEL, np.int64)
        if agree.any():
            self.account.charge([plan.event(int(agree.sum()))])
            labels[agree] = self._mechanism.release(combined[agree], plan, self._draws).labels
        return NoisyAnswers(labels)

    def _combined(self, inputs: Tensor) -> NDArray[Any]:
        assert self.plan is not None
        parts = [
            self._mechanism.combine(self._outputs(chunk), self.plan)
            for chunk in inputs.split(_ROWS_AT_ONCE)
        ]
        return np.concatenate(parts)

    def _outputs(self, inputs: Tensor) -> NDArray[Any]:
        """[m, N, K] logits; of "mixing" the public model's come first."""
        found = [_logits(model, inputs) for model in [*self._first, *self.models]]
        if len({each.shape for each in found}) > 1:
            shapes = sorted({each.shape for each in found})
            raise ConfigurationError(
                f"the models give outputs of the shapes {shapes}. All need the same classes."
            )
        return np.stack(found)


def _models(models: Model | Sequence[Model]) -> list[Model]:
    several = [models] if callable(models) else list(models)
    if not several:
        raise ConfigurationError("models=[] is empty: give one model, or several.")
    for model in several:
        if not callable(model):
            raise ConfigurationError(f"{type(model).__name__} is no model: it cannot be called.")
        if isinstance(model, nn.Module):
            model.eval()
    return several


def _stand_in(on_exhausted: str | Model) -> Model | None:
    if callable(on_exhausted):
        return on_exhausted
    if on_exhausted != "raise":
        raise ConfigurationError(
            f"on_exhausted={on_exhausted!r} must be 'raise', or a public model that then answers."
        )
    return None


def _logits(model: Model, inputs: Tensor) -> NDArray[Any]:
    with torch.no_grad():
        found = model(inputs)
    array = _numpy(found)
    if array.ndim != 2 or array.shape[0] != len(inputs) or array.shape[1] < 2:
        raise ConfigurationError(
            f"a model gave an output of shape {array.shape} for {len(inputs)} rows. Expected [rows, "
            "classes], with at least two classes."
        )
    return array


def _numpy(found: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = torch.as_tensor(found).detach().to("cpu", torch.float64).numpy()
    return array


def refuse_bad_rows(inputs: Tensor) -> None:
    """Raise ConfigurationError unless `inputs` are rows, [N, ...], of finite numbers."""
    if not isinstance(inputs, Tensor) or inputs.ndim < 2 or not len(inputs):
        shape = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ConfigurationError(
            f"inputs ({shape}) must be a tensor of rows, [N, ...] with N >= 1."
        )
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        row = int((~torch.isfinite(inputs.flatten(1))).any(1).nonzero()[0])
        raise ConfigurationError(f"row {row} of the inputs holds NaN or infinity.")


def _keys(inputs: Tensor) -> list[bytes]:
    """A hash of each row's bytes; -0.0 and 0.0 are equal numbers and give one."""
    rows = (inputs + 0).detach().cpu().flatten(1).contiguous()
    form = f"{inputs.dtype} {list(inputs.shape[1:])}".encode()
    return [hashlib.blake2b(form + row.numpy().tobytes(), digest_size=32).digest() for row in rows]
