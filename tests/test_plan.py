"""The plan and its statement."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

import dptorch
from dptorch import accounting
from dptorch.errors import ConfigurationError
from dptorch.plan import PrivacyPlan, make_plan
from dptorch.statement import ASSUMED, NOT_COVERED, make_statement

PLAN = make_plan(batch_size=64, sample_size=1024, epochs=2, noise_multiplier=1.1, target_delta=1e-5)


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.noise_multiplier = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_calibration_spends_the_target_and_never_more(target: float, accountant: str) -> None:
    plan = make_plan(
        batch_size=64, sample_size=1024, epochs=2, target_epsilon=target, target_delta=1e-5,
        accountant=accountant,
    )  # fmt: skip
    assert 0.99 * target <= plan.epsilon() <= target


def test_epsilon_is_the_accountants() -> None:
    for steps in (0, 1, 7, PLAN.steps):
        for amplified, rate in ((True, PLAN.sample_rate), (False, 1.0)):
            expected = accounting.epsilon(
                sample_rate=rate, noise_multiplier=1.1, steps=steps, delta=1e-5, accountant="pld"
            )
            assert PLAN.epsilon(steps, amplified=amplified) == expected


def test_replace_one_costs_as_much_as_half_the_noise_does() -> None:
    full = dataclasses.replace(PLAN, sample_rate=1.0)
    replaced = dataclasses.replace(full, adjacency="replace-one")
    halved = dataclasses.replace(full, noise_multiplier=full.noise_multiplier / 2)
    assert replaced.epsilon() == pytest.approx(halved.epsilon(), rel=1e-6)
    assert dataclasses.replace(PLAN, adjacency="replace-one").epsilon() > PLAN.epsilon()


@pytest.mark.parametrize(
    ("epochs", "rate", "steps"),
    [(20, 0.25, 80), (1, 1 / 3, 3), (3, 256 / 50_000, 586), (0.5, 1, 1)],
)
def test_epochs_become_whole_steps(epochs: float, rate: float, steps: int) -> None:
    plan = make_plan(
        sample_rate=rate, sample_size=50_000, epochs=epochs, noise_multiplier=1.0,
        target_delta=1e-6,
    )  # fmt: skip
    assert plan.steps == steps


def test_json_round_trip(tmp_path: Path) -> None:
    assert PrivacyPlan.from_json(PLAN.to_json()) == PLAN
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    assert PrivacyPlan.from_json(path) == PLAN
    for broken in ("{}", "not json", PLAN.to_json()[:-5], '{"format": 1, "nois": 3}'):
        with pytest.raises(ConfigurationError, match="plan"):
            PrivacyPlan.from_json(broken)
    newer = json.dumps(json.loads(PLAN.to_json()) | {"format": 99})
    with pytest.raises(ConfigurationError, match="newer"):
        PrivacyPlan.from_json(newer)
    worse = json.dumps(json.loads(PLAN.to_json()) | {"noise_multiplier": -1.0})
    with pytest.raises(ConfigurationError, match="noise_multiplier"):
        PrivacyPlan.from_json(worse)


def test_differences_are_named() -> None:
    other = dataclasses.replace(PLAN, noise_multiplier=0.5)
    assert PLAN.differences(other) == ["noise_multiplier: 1.1, 0.5"]


# -- the statement ---------------------------------------------------------------------------------


def statement(sampling: dict[str, int], provenance: str = "operating system"):
    return make_statement(PLAN, 10, sampling, provenance)


def test_the_statement_says_everything_that_matters() -> None:
    made = statement({"poisson": 10})
    text = str(made)
    for phrase in (
        "replacing one example by one that contributes nothing",
        "zero-out",
        "1e-05",
        "Poisson",
        "10 steps: poisson",
        "in a place that no other record moves",
        "Gaussian noise, multiplier 1.1",
        "operating system",
        *NOT_COVERED,
        *(item.format(unit="example") for item in ASSUMED),
        dptorch.__version__,
    ):
        assert phrase in text, phrase
    values = made.to_dict()
    assert values["epsilon"] == PLAN.epsilon(10)
    assert json.loads(json.dumps(values)) == values


def test_a_stated_epsilon_is_rounded_up() -> None:
    made = statement({"poisson": 10})
    stated = float(str(made).split("(")[1].split(",")[0])
    assert PLAN.epsilon(10) <= stated < PLAN.epsilon(10) + 1e-4


def test_the_statement_does_not_claim_amplification_it_did_not_have() -> None:
    made = statement({"poisson": 9, "the user's own loader": 1})
    assert made.to_dict()["epsilon"] == PLAN.epsilon(10, amplified=False)
    assert "NOTE: not every batch" in str(made)
    assert "NOTE" not in str(statement({"poisson": 10}))


def test_a_seed_is_named_as_not_private() -> None:
    assert "protects nobody" in str(statement({"poisson": 10}, "user seed (not private)"))


def test_no_noise_is_infinite() -> None:
    plan = dataclasses.replace(PLAN, noise_multiplier=0.0)
    made = make_statement(plan, 1, {"poisson": 1}, "operating system")
    assert math.isinf(made.epsilon)
    assert "infinity" in str(made)
