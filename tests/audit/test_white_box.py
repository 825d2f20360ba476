"""The white-box audit: what is right passes, and every class of DP bug at ε = 1 is refuted.

The engine is broken from outside, one line at a time, as a mistake in it would.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.oracles.loop import one_example_loop
from torch import Tensor

from dptorch import make_plan
from dptorch.accounting.pairs.sampled import gaussian_epsilon
from dptorch.audit import audit
from dptorch.audit.games.dirac import TiedTable, play_dirac
from dptorch.audit.result import prove
from dptorch.clipping import functions
from dptorch.engine import privacy_engine
from dptorch.errors import ConfigurationError
from dptorch.noise import GaussianNoise, banded
from dptorch.plan import PrivacyPlan
from dptorch.sampling import PoissonSampler
from dptorch.tape.gradients.store import FormStore


def small_plan(**changes: Any) -> PrivacyPlan:
    """ε = 1: 60 Poisson batches."""
    settings = {"sample_rate": 0.05, "sample_size": 1000, "steps": 60, "target_epsilon": 1.0}
    return make_plan(**settings | {"target_delta": 1e-5} | changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss_reduction": "sum"},
        {"adjacency": "replace-one"},
        {"clipping_fn": "automatic", "max_grad_norm": 0.3},
        {"sample_rate": 1.0, "steps": 20},
    ],
    ids=str,
)
def test_the_right_engine_is_not_refuted(changes: dict[str, Any]) -> None:
    plan = small_plan(**changes)
    result = audit(plan, canaries=600, seed=3)
    assert result.verdict == "NOT REFUTED"
    assert 0.7 < result.epsilon_lower < plan.epsilon()


def scaled_noise(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    plain = GaussianNoise.privatize

    def privatize(self: GaussianNoise, *arguments: Any, **more: Any) -> Any:
        self.noise_multiplier *= factor
        return plain(self, *arguments, **more)

    monkeypatch.setattr(GaussianNoise, "privatize", privatize)


def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled_noise(monkeypatch, 0.0)


def noise_over_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled_noise(monkeypatch, 1 / 50)


def clip_after_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    def clip(norms: Tensor, bound: float, **_: Any) -> Tensor:
        return torch.full_like(norms, min(1.0, bound / norms.mean().item()))

    monkeypatch.setitem(functions.FUNCTIONS, "abadi", clip)


def repeated_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PoissonSampler.draw
    monkeypatch.setattr(PoissonSampler, "draw", lambda self, step: plain(self, 0))


def reused_key(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GaussianNoise.privatize

    def privatize(self: GaussianNoise, clipped: Any, key: Any, step: int, **_: Any) -> Any:
        return plain(self, clipped, key, 0)

    monkeypatch.setattr(GaussianNoise, "privatize", privatize)


def tied_weight_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = lambda self, key: self._forms[key][0].squared_norm()
    monkeypatch.setattr(FormStore, "_squared_norm_of_sum", first)


def without_cross_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = lambda self, key: sum(form.squared_norm() for form in self._forms[key])
    monkeypatch.setattr(FormStore, "_squared_norm_of_sum", apart)


TWINS = [
    no_noise,
    noise_over_batch,
    clip_after_the_mean,
    repeated_sample,
    reused_key,
    tied_weight_counted_once,
    without_cross_terms,
]


@pytest.mark.slow
@pytest.mark.parametrize("twin", TWINS, ids=lambda t: t.__name__)
def test_each_broken_twin_is_refuted(monkeypatch: pytest.MonkeyPatch, twin: Any) -> None:
    plan = small_plan()
    with monkeypatch.context() as patch:
        twin(patch)
        result = audit(plan, canaries=2000, seed=3)
    assert result.verdict == "REFUTED", f"{twin.__name__}: {result}"


@pytest.mark.slow
@pytest.mark.parametrize("twin", [repeated_sample, reused_key], ids=lambda t: t.__name__)
def test_what_repeats_is_seen_over_the_whole_run(
    monkeypatch: pytest.MonkeyPatch, twin: Any
) -> None:
    # Single steps are as they should be, so the other bound has to find it.
    with monkeypatch.context() as patch:
        twin(patch)
        steps, run = audit(small_plan(), canaries=2000, seed=3).proofs
    assert steps.epsilon_lower < 1 < run.epsilon_lower


@pytest.mark.slow
def test_power_at_epsilon_4_38() -> None:
    plan = make_plan(
        sample_rate=1.0, sample_size=1000, steps=25, noise_multiplier=5.0, target_delta=1e-5
    )
    assert plan.epsilon() == pytest.approx(gaussian_epsilon(1e-5, 1.0), abs=1e-2)  # 4.377
    result = audit(plan, canaries=1000, seed=1)
    assert 3.5 <= result.epsilon_lower <= plan.epsilon()


@pytest.mark.slow
def test_false_alarms_of_the_engine_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # One step at noise multiplier 1, μ = 1: the bound is exact, so 2.5 to 7.5 % of 400 audits err.
    plan = make_plan(
        sample_rate=1.0, sample_size=100, steps=1, noise_multiplier=1.0, target_delta=1e-5
    )
    wrong = 0
    for seed in range(400):
        game = play_dirac(plan, canaries=100, seed=seed)
        proof = prove(game.steps, "gaussian", delta=1e-5, significance=0.05)
        wrong += proof.epsilon_lower > plan.epsilon()
        # It is the same model in all of them: looking at its first batch once is enough.
        monkeypatch.setattr(privacy_engine, "first_batch_checks", lambda *_: [])
    assert 0.025 <= wrong / 400 <= 0.075


def test_the_game_is_what_it_says() -> None:
    # Against a loop over examples, and the scores of a run without noise.
    model = TiedTable(5).double()
    with torch.no_grad():
        model.table.copy_(torch.randn(5, 1))
    ids, scales = torch.tensor([3, 0, 3]), torch.randn(3, 2, dtype=torch.float64)
    found = one_example_loop(model, (ids, scales), lambda m, i, s: m(i, s).sum())["table"][..., 0]
    expected = torch.zeros(3, 5, dtype=torch.float64)
    expected[torch.arange(3), ids] = scales.sum(1)
    assert torch.allclose(found, expected)
    plan = make_plan(
        sample_rate=0.5, sample_size=100, steps=8, noise_multiplier=0.0, target_delta=1e-5,
        max_grad_norm=0.7, loss_reduction="mean",
    )  # fmt: skip
    game = play_dirac(plan, canaries=50, seed=0)
    assert np.allclose(game.steps.members, 1.0, atol=1e-4)
    assert np.allclose(game.steps.others, 0.0, atol=1e-4)
    assert np.allclose(game.run.others, 0.0, atol=1e-4)
    assert 0.3 < game.run.members.mean() < 0.7


def test_mistakes_and_words() -> None:
    plan = small_plan()
    with pytest.raises(ConfigurationError, match="at least 20"):
        audit(plan, canaries=19)
    with pytest.raises(ConfigurationError, match="the plan has 60 steps"):
        audit(plan, steps=61)
    with pytest.raises(ConfigurationError, match="plan or a run"):
        audit(3)  # type: ignore[arg-type]
    result = audit(plan, canaries=100, steps=7, seed=0)
    text = str(result)
    assert "first 7 of 60 steps" in text
    assert "verified" not in text.lower()
    values = result.to_dict()
    assert values["ceiling"] is None
    assert math.isclose(values["confidence"], 0.95)
    assert values["steps"] == 7


BANDED = {"mechanism": "banded", "bands": 4, "sample_rate": 0.1, "target_epsilon": 2.0}


INVERSE = {"mechanism": "inverse-banded", "bands": 4, "sample_rate": 0.1, "target_epsilon": 10.0}


BUFFERED = INVERSE | {"mechanism": "buffered-toeplitz", "bands": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "adjacency", "steps"),
    [
        (BUFFERED, "zero-out", 20),
        (BANDED, "zero-out", 40),
        (BANDED, "replace-one", None),
        (INVERSE, "zero-out", 20),
    ],
)
def test_correlated_noise_is_not_refuted(
    settings: dict[str, Any], adjacency: str, steps: int | None
) -> None:
    """Nearly tight: what steps show is put together over the bands first."""
    plan = small_plan(**settings, adjacency=adjacency)
    result = audit(plan, canaries=600, seed=3, steps=steps)
    assert result.verdict == "NOT REFUTED"
    assert 0.5 < result.epsilon_lower / plan.epsilon() < 1.0


@pytest.mark.slow
def test_a_matrix_whose_columns_are_too_long_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(**BANDED)
    with monkeypatch.context() as patch:
        patch.setattr(banded, "column_norms", lambda c, steps: np.ones(steps))
        result = audit(plan, canaries=2000, seed=3)
    assert result.verdict == "REFUTED", str(result)
