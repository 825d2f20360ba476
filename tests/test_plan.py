"""The plan and its statement."""

import dataclasses
import inspect
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import dptorch
from dptorch import accounting
from dptorch.accounting import Adjacency, SampledGaussian
from dptorch.errors import ConfigurationError, PrivacyError, PrivacyWarning
from dptorch.ledger.reading import plan_hash
from dptorch.noise import MECHANISMS
from dptorch.plan import PlanSettings, PrivacyPlan, make_plan
from dptorch.plan.privacy_plan import _EVENTS, _with_mechanism
from dptorch.plan.settings import _FIELDS
from dptorch.randomness import KeySource
from dptorch.sampling import SCHEMES
from dptorch.sampling.schemes import OWN_LOADER
from dptorch.statement import ASSUMED, NOT_COVERED, RELEASED, Statement, make_statement

PLAN = make_plan(batch_size=64, sample_size=1024, epochs=2, noise_multiplier=1.1, target_delta=1e-5)


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.noise_multiplier = 0.0  # type: ignore[misc]


@pytest.mark.slow
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
        for own, rate in ((0, PLAN.sample_rate), (steps, 1.0)):
            expected = accounting.epsilon(
                sample_rate=rate, noise_multiplier=1.1, steps=steps, delta=1e-5, accountant="pld"
            )
            assert PLAN.epsilon(steps, own_loader_steps=own) == expected


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


def test_the_hash_of_a_plan_stays_what_it_was() -> None:
    """A ledger knows the runs of older versions by it: what a new field says by default is left out."""
    assert plan_hash(PLAN) == "cd2ee5637dbfbbdded4754f76deb948c30066dd2cfadbd6aaeef9311f7c18f51"


@pytest.mark.parametrize("sampling", ["poisson", "truncated-poisson", "cyclic-poisson"])
@pytest.mark.parametrize("name", PlanSettings.__annotations__)
def test_a_setting_of_another_type_is_refused_in_words(name: str, sampling: str) -> None:
    """Nothing but a ConfigurationError that names the setting, whatever is passed."""
    rest = {
        "sample_size": 1000, "batch_size": 50, "steps": 4, "noise_multiplier": 1.0,
        "target_delta": 1e-5, "sampling": sampling,
    }  # fmt: skip
    if name in ("sample_rate", "epochs", "target_epsilon"):
        del rest[{"sample_rate": "batch_size", "epochs": "steps"}.get(name, "noise_multiplier")]
    for value in ("x", "", b"8", [], [None], {"a": "b"}, 1j, object(), float("nan"), 10**400):
        with pytest.raises(
            ConfigurationError, match=name.removeprefix("target_").replace("_", ".")
        ):
            make_plan(**{**rest, name: value})


def test_differences_are_named() -> None:
    other = dataclasses.replace(PLAN, noise_multiplier=0.5)
    assert PLAN.differences(other) == ["noise_multiplier: 1.1, 0.5"]


# -- the statement ---------------------------------------------------------------------------------


def statement(
    sampling: dict[str, int], source: KeySource = KeySource.OS, plan: PrivacyPlan = PLAN
) -> Statement:
    return make_statement(plan, sum(sampling.values()), sampling, source)


def test_the_statement_says_everything_that_matters() -> None:
    made = statement({"poisson": 10})
    text = str(made)
    for phrase in (
        "replacing one example by one that contributes nothing",
        "zero-out",
        "1e-05",
        "Sampling planned     poisson: every example enters every batch with probability 0.0625",
        "10 steps: poisson",
        "its place does not depend on other records",
        "Gaussian noise, multiplier 1.1",
        "operating system",
        "certified for what ran (accountant pld, an upper bound)",
        "exact, for planning",
        RELEASED,
        "number of examples 1024",
        "expected batch size 64",
        *NOT_COVERED,
        *(item.format(unit="example") for item in ASSUMED),
        dptorch.__version__,
    ):
        assert phrase in text, phrase
    values = made.to_dict()
    assert values["epsilon"] == PLAN.epsilon(10)
    assert values["epsilon_exact"] == PLAN.epsilon(10, accountant="exact")
    assert json.loads(json.dumps(values)) == values


def test_a_stated_epsilon_is_rounded_up() -> None:
    made = statement({"poisson": 10})
    stated = float(str(made).split("(")[1].split(",")[0])
    assert PLAN.epsilon(10) <= stated < PLAN.epsilon(10) + 1e-4


def test_the_statement_does_not_claim_amplification_it_did_not_have() -> None:
    own = statement({OWN_LOADER: 10})
    assert (
        own.epsilon
        == own.epsilon_unamplified
        == accounting.epsilon(
            sample_rate=1.0, noise_multiplier=1.1, steps=10, delta=1e-5, accountant="pld"
        )
    )
    assert str(own).startswith(f"These 10 training steps are ({up(own.epsilon)}, 1e-05)")
    for made in (own, statement({"poisson": 9, OWN_LOADER: 1})):
        assert not made.sampling_holds
        assert made.epsilon_if_poisson == PLAN.epsilon(10)
        assert "NOTE: not every batch" in str(made)
        assert f"{up(made.epsilon_if_poisson)} is what Poisson accounting would have" in str(made)
    assert "NOTE" not in str(statement({"poisson": 10}))


def test_add_remove_is_not_stated_for_batches_of_the_users_own_loader() -> None:
    """A record that is added shifts those behind it into other batches; zero-out moves none."""
    plan = dataclasses.replace(PLAN, adjacency="add-remove")
    for own in (1, 10):
        made = statement({"poisson": 10 - own, OWN_LOADER: own}, plan=plan)
        first, text = str(made).split("\n", 1)
        assert "replacing one example by one that contributes nothing" in first
        assert "Adjacency            zero-out" in text
        assert "NOTE: planned was add-remove" in text
        assert made.to_dict()["adjacency"] == "zero-out"
        assert "contributes nothing" in made.to_dict()["adjacency_text"]
        assert made.epsilon == plan.epsilon(10, own_loader_steps=own)
    sampled = statement({"poisson": 10}, plan=plan)
    assert sampled.to_dict()["adjacency"] == "add-remove"
    assert "adding or removing one example" in str(sampled).split("\n", 1)[0]
    replaced = dataclasses.replace(PLAN, adjacency="replace-one")
    assert statement({OWN_LOADER: 10}, plan=replaced).to_dict()["adjacency"] == "replace-one"


def test_only_the_steps_on_other_batches_lose_amplification() -> None:
    epsilons = [statement({"poisson": 10 - own, OWN_LOADER: own}).epsilon for own in (0, 1, 5, 10)]
    assert epsilons == sorted(set(epsilons))
    exactly = accounting.get_accountant("pld").epsilon(
        [SampledGaussian(1.1, PLAN.sample_rate, 9), SampledGaussian(1.1, 1.0, 1)], 1e-5
    )
    assert exactly <= epsilons[1] < 1.05 * exactly


def up(epsilon: float) -> str:
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}"


def test_a_seed_is_named_as_not_private() -> None:
    assert "protects nobody" in str(statement({"poisson": 10}, KeySource.SEED))


def test_no_noise_is_infinite() -> None:
    plan = dataclasses.replace(PLAN, noise_multiplier=0.0)
    made = make_statement(plan, 1, {"poisson": 1}, KeySource.OS)
    assert math.isinf(made.epsilon)
    assert "infinity" in str(made)


def test_the_certified_number_is_a_bound_whatever_was_planned_with() -> None:
    """A plan made with an estimate is stated by an accountant that bounds."""
    for name in ("gdp", "exact"):
        made = statement({"poisson": 10}, plan=dataclasses.replace(PLAN, accountant=name))
        assert made.accountant == "pld"
        assert made.epsilon == PLAN.epsilon(10)
    rdp = statement({"poisson": 10}, plan=dataclasses.replace(PLAN, accountant="rdp"))
    assert rdp.accountant == "rdp"
    assert rdp.epsilon > PLAN.epsilon(10)


# -- sampling schemes and units ---------------------------------------------------------------------

SETTINGS = {"batch_size": 64, "sample_size": 1024, "epochs": 2, "target_delta": 1e-5}
NEEDS_PUBLIC_SIZE = ["fixed-size", "fixed-size-with-replacement", "sequential", "shuffled",
                     "truncated-poisson"]  # fmt: skip


def settings_for(sampling: str) -> dict[str, Any]:
    """One step only where composing is slow."""
    length = {"steps": 1} if sampling == "fixed-size-with-replacement" else {"epochs": 2}
    return {
        "batch_size": 64,
        "sample_size": 1024,
        "target_delta": 1e-5,
        "sampling": sampling,
        **length,
    }


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SCHEMES)
def test_calibration_uses_the_schemes_own_event(sampling: str) -> None:
    plan = make_plan(**settings_for(sampling), target_epsilon=3.0)
    certified = accounting.get_accountant("pld").epsilon(
        [SCHEMES[sampling].event(plan.terms, plan.noise_multiplier, plan.steps)],
        1e-5,
        adjacency=plan.adjacency,
    )
    assert plan.epsilon() == certified
    assert 2.97 <= certified <= 3.0


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SCHEMES)
def test_the_statement_names_the_law_and_both_numbers(sampling: str) -> None:
    plan = make_plan(**settings_for(sampling), noise_multiplier=2.0)
    made = statement({sampling: plan.steps}, plan=plan)
    assert made.sampling_holds
    assert made.epsilon == plan.epsilon()
    assert f"{up(made.epsilon)} certified" in str(made)
    assert SCHEMES[sampling].describe(plan.terms, "example") in str(made)
    claimed = "what Poisson accounting would have claimed" in str(made)
    assert claimed == (sampling != "poisson")
    poisson = make_plan(**SETTINGS, noise_multiplier=2.0).epsilon(plan.steps)
    assert made.epsilon_if_poisson == pytest.approx(poisson, rel=1e-9)
    if sampling in ("shuffled", "sequential"):
        assert made.epsilon > 2 * made.epsilon_if_poisson
    assert json.loads(json.dumps(made.to_dict()))["sampling_planned"] == sampling
    assert PrivacyPlan.from_json(plan.to_json()) == plan


def test_a_scheme_states_what_no_theorem_covers() -> None:
    """Under add/remove the numbers of these depend on how many records there are."""
    for sampling in NEEDS_PUBLIC_SIZE:
        with pytest.raises(ConfigurationError, match=r"adjacency='zero-out' or 'replace-one'"):
            make_plan(**SETTINGS, noise_multiplier=1.0, sampling=sampling, adjacency="add-remove")
        with pytest.raises(ConfigurationError, match=r"sample_size|adjacency"):
            make_plan(
                batch_size=64, sample_rate=0.01, steps=5, noise_multiplier=1.0, target_delta=1e-5,
                sampling=sampling,
            )  # fmt: skip
    with pytest.raises(ConfigurationError, match="random-allocation"):
        make_plan(
            **SETTINGS, noise_multiplier=1.0, sampling="random-allocation", adjacency="replace-one"
        )
    every = [name for name in SCHEMES if name not in NEEDS_PUBLIC_SIZE]
    for name in every:
        plan = make_plan(
            batch_size=64, sample_rate=1 / 16, steps=5, noise_multiplier=1.0, target_delta=1e-5,
            sampling=name,
        )  # fmt: skip
        assert plan.adjacency is Adjacency.ADD_REMOVE
        assert plan.sample_size is None


def test_an_unknown_sampler_is_refused_with_the_two_honest_choices() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        make_plan(**SETTINGS, noise_multiplier=1.0, sampling="shufled")
    text = str(refusal.value)
    assert "Did you mean 'shuffled'?" in text
    assert "let the engine draw" in text
    assert "loader of your own" in text


def test_an_accountant_that_does_not_cover_the_scheme_is_refused_when_planning() -> None:
    with pytest.raises((ConfigurationError, PrivacyError), match="pld"):
        make_plan(**SETTINGS, noise_multiplier=1.0, sampling="random-allocation", accountant="gdp")


@pytest.mark.parametrize("sampling", ["random-allocation", "shuffled", "sequential"])
@pytest.mark.parametrize(("batch", "steps_per_epoch"), [(300, 3), (256, 4), (1000, 1), (1, 1000)])
def test_an_epoch_is_a_whole_number_of_steps(
    sampling: str, batch: int, steps_per_epoch: int
) -> None:
    plan = make_plan(
        batch_size=batch, sample_size=1000, epochs=2, noise_multiplier=1.0, target_delta=1e-5,
        sampling=sampling,
    )  # fmt: skip
    assert plan.terms.steps_per_epoch == steps_per_epoch
    assert plan.steps == 2 * steps_per_epoch
    assert plan.sample_rate == 1 / steps_per_epoch
    assert plan.expected_batch_size == pytest.approx(1000 / steps_per_epoch)


@pytest.mark.slow
def test_capacity() -> None:
    def plan(**settings: Any) -> PrivacyPlan:
        given: dict[str, Any] = {
            "sample_size": 100_000, "batch_size": 1024, "steps": 100, "noise_multiplier": 1.0,
            "accountant": "exact",
        }  # fmt: skip
        return make_plan(
            **given | {"target_delta": 1e-6, "sampling": "truncated-poisson"} | settings
        )

    assert plan().capacity == 1024 + 8 * 32
    assert plan(capacity=1100).capacity == 1100
    # It costs nothing in ε, and a tight capacity costs what its overflow is.
    assert plan().epsilon() == pytest.approx(plan(sampling="poisson").epsilon(), rel=1e-6)
    assert plan(capacity=1200).epsilon() > plan().epsilon()
    # A small batch needs more room than 8 standard deviations of a normal law.
    small = plan(batch_size=4, steps=10)
    assert small.capacity is not None
    assert small.capacity > 4 + 8 * 2
    assert small.epsilon() == pytest.approx(
        plan(batch_size=4, steps=10, sampling="poisson").epsilon(), rel=1e-4
    )
    with pytest.raises(ConfigurationError, match="below the mean batch size"):
        plan(capacity=1000)
    with pytest.raises(ConfigurationError, match="truncated-poisson"):
        plan(capacity=2000, sampling="poisson")
    for bad in (0, -5, 1200.5, True):
        with pytest.raises(ConfigurationError, match="capacity"):
            plan(capacity=bad)


def test_units() -> None:
    def plan(**settings: Any) -> PrivacyPlan:
        return make_plan(**SETTINGS, noise_multiplier=1.0, **settings)

    users = plan(unit="user", max_examples_per_user=8, max_grad_norm=2.0)
    assert users.max_example_norm == 0.25
    assert plan().max_example_norm == 1.0
    made = statement({"poisson": 10}, plan=users)
    assert "replacing one user by one that contributes nothing" in str(made)
    assert "at most 8 enter a step, each clipped to 0.25" in str(made)
    assert "number of users 1024" in str(made)
    assert "user_ids gives the user of each example" in str(made)
    packed = str(statement({"poisson": 10}, plan=plan(unit="packed sequence")))
    assert "spread over several rows is NOT covered" in packed
    assert "NOTE: the unit is the packed row" in packed
    for bad in ({"unit": "user"}, {"max_examples_per_user": 3}, {"unit": "household"},
                {"unit": "user", "max_examples_per_user": 0},
                {"unit": "user", "max_examples_per_user": 1.5}):  # fmt: skip
        with pytest.raises(ConfigurationError, match=r"max_examples_per_user|unit"):
            plan(**bad)


def test_what_a_plan_cannot_honour_is_refused() -> None:
    plan = make_plan(**SETTINGS, noise_multiplier=1.0, sampling="shuffled")
    with pytest.raises(ConfigurationError, match="make_plan"):
        dataclasses.replace(plan, sample_rate=0.3)
    with pytest.raises(ConfigurationError, match="needs a capacity"):
        dataclasses.replace(PLAN, sampling="truncated-poisson")


@pytest.mark.parametrize(
    "size",
    [{"sample_size": 3985}, {"sample_rate": 64 / 3985}],
    ids=["stated", "implied by the rate"],
)
def test_a_delta_above_one_over_the_records_warns(size: dict[str, Any]) -> None:
    with pytest.warns(PrivacyWarning, match=r"delta=0\.5 is not below 1/3985"):
        make_plan(batch_size=64, steps=1, noise_multiplier=1.0, target_delta=0.5, **size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plan(batch_size=64, steps=1, noise_multiplier=1.0, target_delta=1e-5, **size)


def _lost_settings(source: str) -> set[str]:
    """Settings that `make_plan` neither hands on as they are nor reads by name."""
    read = set(re.findall(r'settings\.get\(\s*"(\w+)"', source))
    return set(PlanSettings.__annotations__) - set(_FIELDS) - read


def test_no_setting_is_accepted_and_lost() -> None:
    source = inspect.getsource(make_plan)
    assert _lost_settings(source) == set()
    # The broken twin: what is read under another name is found.
    assert _lost_settings(source.replace('"sample_rate"', '"rate"')) == {"sample_rate"}


@pytest.mark.parametrize("bad", [True, "1", "x", None, math.nan])
def test_a_norm_that_is_no_number_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_grad_norm="):
        make_plan(batch_size=10, sample_size=1000, steps=1, noise_multiplier=1.0, max_grad_norm=bad)


def test_every_mechanism_has_its_own_event() -> None:
    assert set(_EVENTS) == set(MECHANISMS)
    with pytest.raises(ConfigurationError, match="mechanism='newcomer'"):
        _with_mechanism("newcomer", SampledGaussian(1.0, 0.1, 1), "poisson")
