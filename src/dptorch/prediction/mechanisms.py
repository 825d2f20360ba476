"""Ways to answer a query: what the models contribute, its sensitivity, and the noise.

m models were trained on disjoint parts of the data, so that one record is in one model's data. What
each contributes to an answer is bounded (`dptorch.prediction.bounded`). With B = `clip`:

| mechanism | of each model | combined | Δ | noise | released |
|---|---|---|---|---|---|
| gaussian | logits, L2 norm <= B | mean | 2B/m (L2) | normal | all noisy logits |
| laplace | logits, L1 norm <= B | mean | 2B/m (L1) | Laplace | all noisy logits |
| noisy-max | logits, each <= B | mean | 2B/m (each) | Gumbel, 2Δ/ε | the label |
| gnmax | one vote | sum | √2 (L2) | normal | all noisy votes |
| mixing | probabilities near public ones | mean | see `Mixing` | the draw itself | a label |
| confident-gnmax | one vote | sum | 1 of the most votes, then √2 | normal, twice | the label, or none |

Sources: GNMax and Confident-GNMax are of Papernot et al. 2018 (arXiv:1802.08908). Report-noisy-max with
Gumbel noise is the exponential mechanism (McSherry and Talwar 2007), which is (ε, 0)-private. ε is the
data-independent one throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dptorch.noise.draws import Draws
from dptorch.plan.prediction_plan import PredictionPlan
from dptorch.prediction.bounded import clip_logits, votes_of

__all__ = [
    "MECHANISMS",
    "NO_LABEL",
    "Mechanism",
    "Mixing",
    "NoisyAnswers",
    "radius_of",
    "scale_of",
    "sensitivity_of",
]

Array = NDArray[Any]
#: The label of an answer without one: no class had votes enough.
NO_LABEL: Final = -1
"""The label of a query on which the models do not agree ("confident-gnmax")."""


@dataclass(frozen=True)
class NoisyAnswers:
    """Answers to N queries, with their noise.

    Attributes:
        labels: int64 [N].
        scores: float64 [N, K] noisy logits or votes, or None where only labels are released.
    """

    labels: Array
    scores: Array | None = None


class Mechanism(Protocol):
    """Combine what m models say, and add noise."""

    def combine(self, outputs: Array, plan: PredictionPlan) -> Array:
        """Bound and combine logits [m, N, K] into [N, K], of sensitivity `sensitivity_of(plan)`."""

    def release(self, combined: Array, plan: PredictionPlan, draws: Draws) -> NoisyAnswers:
        """Add the noise that `plan.event(N)` stands for."""


@dataclass(frozen=True)
class Logits:
    """The mean of clipped logits, all released; with normal or Laplace noise."""

    norm: str
    law: Literal["normal", "laplace"]

    def combine(self, outputs: Array, plan: PredictionPlan) -> Array:
        """See `Mechanism`."""
        assert plan.clip is not None
        return clip_logits(outputs, plan.clip, self.norm).mean(0)

    def release(self, combined: Array, plan: PredictionPlan, draws: Draws) -> NoisyAnswers:
        """See `Mechanism`."""
        scores = combined + scale_of(plan) * getattr(draws, self.law)(combined.shape)
        return NoisyAnswers(scores.argmax(-1), scores)


@dataclass(frozen=True)
class NoisyMax:
    """The label of the largest mean clipped logit, with Gumbel noise."""

    norm: str = "max"

    def combine(self, outputs: Array, plan: PredictionPlan) -> Array:
        """See `Mechanism`."""
        assert plan.clip is not None
        return clip_logits(outputs, plan.clip, self.norm).mean(0)

    def release(self, combined: Array, plan: PredictionPlan, draws: Draws) -> NoisyAnswers:
        """See `Mechanism`."""
        noisy = combined + scale_of(plan) * draws.gumbel(combined.shape)
        return NoisyAnswers(noisy.argmax(-1))


@dataclass(frozen=True)
class Votes:
    """The label with most votes, with normal noise (GNMax)."""

    def combine(self, outputs: Array, plan: PredictionPlan) -> Array:
        """See `Mechanism`."""
        return votes_of(outputs).sum(0)

    def release(self, combined: Array, plan: PredictionPlan, draws: Draws) -> NoisyAnswers:
        """See `Mechanism`."""
        noisy = combined + scale_of(plan) * draws.normal(combined.shape)
        return NoisyAnswers(noisy.argmax(-1), noisy)

    def agree(self, combined: Array, plan: PredictionPlan, draws: Draws) -> Array:
        """Which queries pass the check of "confident-gnmax": bool [N].

        The most votes move by at most 1 where one model changes.
        """
        assert plan.check_noise is not None
        assert plan.threshold is not None
        most = combined.max(-1)
        return most + plan.check_noise * draws.normal(most.shape) >= plan.threshold


@dataclass(frozen=True)
class Mixing:
    """A label drawn from the mean of distributions, each kept near a public model's.

    For language models, whose next token is drawn anyway (PMixED: Flemings, Razaviyayn, Annavaram 2024,
    arXiv:2403.15638, with a bound on every ratio in place of a Rényi divergence). Model i's p_i becomes
    λ p_i + (1 - λ) p_0 with the largest λ at which all its ratios to p_0 lie within e^±β. One of m such
    distributions, changed in any way, moves the mean's probabilities by a factor of at most
    (m - 1 + e^2β) / m: the rest of the mean is at least (m - 1) e^-β p_0, and the one lies between
    e^-β p_0 and e^β p_0. A draw is therefore (ε, 0)-private with ε = log(1 + (e^2β - 1) / m), and the
    more models, the larger β may be.

    Guarantees:
        The ratio is not exceeded, and nearly reached
        (`test_mixtures_of_neighbours_differ_by_no_more_than_epsilon`).
    """

    def combine(self, outputs: Array, plan: PredictionPlan) -> Array:
        """Log probabilities [N, K] of the mixture; the public model's come first in `outputs`.

        A row that is not finite counts as the public model's.
        """
        public, others = _log_softmax(outputs[:1]), outputs[1:]
        usable = np.isfinite(others).all(-1, keepdims=True)
        ratios = np.exp(_log_softmax(np.where(usable, others, public)) - public)
        bound = radius_of(plan)
        with np.errstate(divide="ignore"):
            above = math.expm1(bound) / np.maximum(ratios.max(-1, keepdims=True) - 1, 0.0)
            below = -math.expm1(-bound) / np.maximum(1 - ratios.min(-1, keepdims=True), 0.0)
        share = np.minimum(1.0, np.minimum(above, below) * (1 - 2.0**-40))
        mixed = (1 + share * (ratios - 1)).mean(0)
        return public[0] + np.log(mixed)

    def release(self, combined: Array, plan: PredictionPlan, draws: Draws) -> NoisyAnswers:
        """Draw a label of each row; see `Mechanism`."""
        return NoisyAnswers((combined + draws.gumbel(combined.shape)).argmax(-1))


def radius_of(plan: PredictionPlan) -> float:
    """β of "mixing": how far the logarithm of a probability may be from the public model's."""
    return 0.5 * math.log1p(plan.models * math.expm1(plan.noise))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.maximum(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), -600.0)


#: Ways to answer a query, by name.
MECHANISMS: Final[dict[str, Mechanism]] = {
    "gaussian": Logits("l2", "normal"),
    "gnmax": Votes(),
    "confident-gnmax": Votes(),
    "laplace": Logits("l1", "laplace"),
    "noisy-max": NoisyMax(),
    "mixing": Mixing(),
}


def sensitivity_of(plan: PredictionPlan) -> float:
    """How far one model, changed in any way, moves the combined outputs: Δ.

    Guarantees:
        No two values of one model's logits move the combined outputs further, in the norm of the
        mechanism (`test_the_sensitivity_is_reached_and_not_exceeded`).
    """
    if plan.clip is None:
        return math.sqrt(2)
    return 2 * plan.clip / plan.models


def scale_of(plan: PredictionPlan) -> float:
    """The scale of the noise: of a normal number its standard deviation."""
    if plan.mechanism == "laplace":
        return sensitivity_of(plan) / plan.noise
    if plan.mechanism == "noisy-max":
        return 2 * sensitivity_of(plan) / plan.noise
    return sensitivity_of(plan) * plan.noise
