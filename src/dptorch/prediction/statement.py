"""What answers guarantee, in words and as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dptorch.errors import ConfigurationError
from dptorch.plan.prediction_plan import PredictionPlan
from dptorch.prediction.mechanisms import radius_of, scale_of, sensitivity_of
from dptorch.randomness import KeySource
from dptorch.statement import Statement

__all__ = ["Covered", "PredictionStatement", "covered_by"]

_NOT_COVERED = (
    "the inputs that are asked about: the predictor, and whoever runs it, sees them",
    "whether somebody asked for the same input before, which a free answer or its time shows",
    "choices made by looking at the data: the number of models, the clip, the architecture",
    "other releases from the same data, unless they share its ledger and cap",
    "attacks on floating-point arithmetic, and on the time that the models take",
)


@dataclass(frozen=True)
class Covered:
    """The guarantee of a model's training, which holds for all its answers."""

    epsilon: float
    delta: float


def covered_by(trained_with: Statement | Mapping[str, Any], models: int) -> Covered:
    """The guarantee that a statement of training shows.

    Raises:
        ConfigurationError: it shows none.
    """
    values = trained_with.to_dict() if isinstance(trained_with, Statement) else trained_with
    try:
        epsilon, delta = float(values["epsilon"]), float(values["delta"])
        private = values["private_randomness"] is True
    except (KeyError, TypeError, ValueError):
        raise ConfigurationError(
            "trained_with is not the statement of a run: give engine.statement(), or the 'statement' "
            "of its run.json."
        ) from None
    if models != 1:
        raise ConfigurationError(
            f"trained_with is the statement of one model, and there are {models}. Their epsilons add "
            "up where they share data: give one model."
        )
    if not math.isfinite(epsilon) or not private:
        why = "its epsilon is infinite" if private else "its noise came from a user's seed"
        raise ConfigurationError(
            f"the model is not covered by its training ({why}). Leave trained_with out, and give a "
            "budget for its answers."
        )
    return Covered(epsilon, delta)


@dataclass(frozen=True)
class PredictionStatement:
    """A statement about answers; ``str()`` is the text, `to_dict` the same for machines.

    Attributes:
        plan: of the answers; None where the training covers them.
        answered: how many releases were made.
        epsilon: of them.
        key_source: where the noise came from.
        ledger: the budget in the ledger that they were charged to beforehand.
        covered: the guarantee of the training, if answers need none of their own.
    """

    plan: PredictionPlan | None
    answered: int
    epsilon: float
    key_source: KeySource | None
    ledger: Mapping[str, str] | None
    covered: Covered | None

    def to_dict(self) -> dict[str, Any]:
        """The statement as plain values."""
        if self.plan is None:
            assert self.covered is not None
            return {
                "covered_by_training": True,
                "epsilon": self.covered.epsilon,
                "delta": self.covered.delta,
            }
        plan = self.plan
        return {
            "covered_by_training": False,
            "epsilon": self.epsilon,
            "delta": plan.target_delta,
            "budget": plan.target_epsilon,
            "answered": self.answered,
            "queries": plan.queries,
            "mu_if_all_are_asked": plan.mu,
            "sensitivity": sensitivity_of(plan),
            "scale": scale_of(plan),
            "unit": plan.unit,
            "adjacency": plan.adjacency.value,
            "private_randomness": self.key_source is not None and self.key_source.is_private,
            "ledger": None if self.ledger is None else dict(self.ledger),
            "plan": json.loads(plan.to_json()),
            "not_covered": list(_NOT_COVERED),
        }

    def __str__(self) -> str:
        if self.plan is None:
            assert self.covered is not None
            return (
                "Already covered, no noise needed: the model was trained with "
                f"({self.covered.epsilon:.4g}, {self.covered.delta:g})-differential privacy, and "
                "predictions are post-processing of it.\n"
            )
        plan, source = self.plan, self.key_source
        assert source is not None
        bound = f"logits of norm at most {plan.clip:g}" if plan.clip else "one vote each"
        most = (
            f"each answer is ({plan.noise:.4g}, 0)-private"
            if plan.mu is None
            else f"all together have mu={plan.mu:.4g} (Gaussian privacy), one {1 / plan.noise:.4g}"
        )
        noise = [
            f"Sensitivity          {sensitivity_of(plan):.4g}; noise of scale {scale_of(plan):.4g}"
        ]
        if plan.mechanism == "mixing":
            bound = f"log probabilities within {radius_of(plan):.4g} of the public model's"
            noise = []
        lines = [
            f"These {self.answered} answers are ({self.epsilon:.4g}, {plan.target_delta:g})-"
            f"differentially private with respect to one {plan.unit} ({plan.adjacency.value}).",
            "",
            f"Budget               epsilon {plan.target_epsilon:g} at delta {plan.target_delta:g}: "
            f"{plan.queries} answers; {most}",
            f"Mechanism            {plan.mechanism} over {plan.models} model(s), {bound}",
            *noise,
            f"Randomness           key from the {source.value}",
            "Ledger               "
            + (
                "{run} on {dataset}".format(**self.ledger)
                if self.ledger
                else "none: the budget is counted in this process alone, and forgotten with it"
            ),
            "",
            f"Assumed: no {plan.unit} is in the training data of two models, and which model's data it "
            "is in depends on no other.",
            "Not covered:",
            *(f"  - {item}" for item in _NOT_COVERED),
        ]
        return "\n".join(lines) + "\n"
