"""How often a true claim is called REFUTED, over 400 audits at α = 5 %.

Each auditor meets a mechanism whose ε is exactly what is claimed. Where its bound is tight for that
mechanism, 2.5 to 7.5 % of the audits must err (a right auditor at 5 % leaves that range once in 40
choices of the seed); where the argument itself is conservative, at most 7.5 %.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dptorch.accounting.pairs.sampled import gaussian_epsilon
from dptorch.audit import Evidence, judge
from dptorch.audit.thresholds import Bonferroni, Explicit, MultiSplit, Split

AUDITS = 400
DELTA = 1e-5
Game = Callable[[np.random.Generator], Evidence]


def randomised_response(epsilon: float, n: int) -> Game:
    """(ε, 0)-DP, and no less: each bit is told truly with probability e^ε / (1 + e^ε)."""

    def play(rng: np.random.Generator) -> Evidence:
        member = rng.random(n) < 0.5
        lie = rng.random(n) >= 1 / (1 + np.exp(-epsilon))
        return Evidence((member ^ lie).astype(float), member)

    return play


def gaussian(mu: float, n: int) -> Game:
    """μ-GDP, and no less."""

    def play(rng: np.random.Generator) -> Evidence:
        member = rng.random(n) < 0.5
        return Evidence(rng.normal(size=n) + mu * member, member)

    return play


def false_alarms(game: Game, epsilon: float, delta: float, bound: str, threshold: Any) -> float:
    rng = np.random.default_rng(7)
    refuted = 0
    for _ in range(AUDITS):
        result = judge(
            game(rng), epsilon=epsilon, delta=delta, adversary="", bound=bound, threshold=threshold
        )
        refuted += result.refuted
    return refuted / AUDITS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bound", "threshold", "game", "epsilon", "delta"),
    [
        ("one-run", Explicit((0.3, 0.3)), randomised_response(1.0, 1000), 1.0, 0.0),
        ("one-run", Explicit((0.5, 0.5)), gaussian(0.0, 1000), 0.0, 0.0),
        ("one-run-fdp", Explicit((0.5, 0.5)), gaussian(0.0, 1000), 0.0, DELTA),
        ("clopper-pearson", Explicit(0.5), randomised_response(4.0, 4000), 4.0, 0.0),
        ("gaussian", Explicit(None), gaussian(1.0, 400), gaussian_epsilon(DELTA, 1.0), DELTA),
    ],
    ids=["one-run", "one-run, no leak", "one-run-fdp, no leak", "clopper-pearson", "gaussian"],
)
def test_true_claims_are_refuted_as_often_as_stated(
    bound: str, threshold: Any, game: Game, epsilon: float, delta: float
) -> None:
    assert 0.025 <= false_alarms(game, epsilon, delta, bound, threshold) <= 0.075


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bound", "threshold", "game", "epsilon", "delta"),
    [
        ("one-run", Bonferroni(), randomised_response(1.0, 400), 1.0, 0.0),
        ("one-run", Split(), randomised_response(1.0, 400), 1.0, 0.0),
        ("one-run", MultiSplit(3), randomised_response(1.0, 200), 1.0, 0.0),
        ("clopper-pearson", Bonferroni(), gaussian(0.0, 400), 0.0, 0.0),
        ("clopper-pearson", Split(), randomised_response(4.0, 1000), 4.0, 0.0),
        ("gaussian-counts", Bonferroni(), gaussian(1.0, 400), gaussian_epsilon(DELTA, 1.0), DELTA),
    ],
)
def test_a_choice_of_threshold_does_not_add_false_alarms(
    bound: str, threshold: Any, game: Game, epsilon: float, delta: float
) -> None:
    assert false_alarms(game, epsilon, delta, bound, threshold) <= 0.075


class BestOfAll(Bonferroni):
    """The broken twin: keeps the best threshold and pays nothing for it."""

    def epsilon(
        self, bound: Any, evidence: Evidence, *, delta: float, significance: float
    ) -> float:
        return max(
            bound.epsilon(evidence, c, delta=delta, significance=significance)
            for c in bound.candidates(evidence)
        )


def test_choosing_the_threshold_on_its_own_labels_is_caught() -> None:
    game = gaussian(0.0, 400)
    assert false_alarms(game, 0.0, 0.0, "one-run", BestOfAll()) > 0.075
