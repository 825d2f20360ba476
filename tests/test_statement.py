"""The privacy statement as its reader meets it: the first sentence, the numbers, what is assumed."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import dptorch
from dptorch.plan import PrivacyPlan
from dptorch.randomness import KeySource
from dptorch.sampling.schemes import OWN_LOADER
from dptorch.statement import Statement, make_statement

SETTINGS: dict[str, Any] = {
    "batch_size": 16, "sample_size": 64, "steps": 8, "noise_multiplier": 1.0, "target_delta": 1e-3
}  # fmt: skip


def plan_of(**settings: Any) -> PrivacyPlan:
    return dptorch.make_plan(**(SETTINGS | settings))


def statement(
    *,
    steps: int = 4,
    own: int = 0,
    source: KeySource = KeySource.OS,
    resumed: int = 0,
    **settings: Any,
) -> Statement:
    plan = plan_of(**settings)
    run = {plan.sampling: steps - own, OWN_LOADER: own}
    return make_statement(plan, steps, run, source, resumed)


def first_lines(found: Statement) -> str:
    return str(found).split("\n\n", 1)[0].replace("\n", " ")


def section(found: Statement, title: str) -> list[str]:
    """The items under a heading."""
    text = str(found).split(f"{title}:\n", 1)[1]
    return re.match(r"(  - .*\n)+", text).group(0).splitlines()  # type: ignore[union-attr]


def test_the_first_sentence_is_the_whole_promise() -> None:
    found = statement()
    epsilon = math.ceil(found.epsilon * 1e4) / 1e4
    assert first_lines(found) == (
        f"These 4 training steps are ({epsilon:.4f}, 0.001)-differentially private with respect to "
        "replacing one example by one that contributes nothing."
    )


def test_epsilon_is_rounded_up() -> None:
    found = statement()
    stated = float(re.search(r"are \(([\d.]+), ", str(found)).group(1))  # type: ignore[union-attr]
    assert found.epsilon <= stated < found.epsilon + 1e-4


def test_steps_on_a_loader_of_ones_own_are_promised_under_a_condition() -> None:
    """That a record is in a step once is in the first sentence, not only in a list below."""
    found = statement(own=3)
    assert (
        "provided that no example is in more than one row of all batches that add up to a step"
        in (first_lines(found))
    )
    assert "3 of the steps took their batches from a loader of the user's own" in first_lines(found)
    assumed = section(found, "Assumed")[0]
    for way in (
        "without replacement",
        "over the end of an epoch",
        "no batch is backpropagated twice",
    ):
        assert way in assumed
    assert "in k rows of a step counts k times" in assumed


def test_the_engines_own_batches_need_no_condition() -> None:
    """The control: the engine draws each record at most once, and sees to it."""
    assert "provided" not in str(statement())
    assert "replacement" not in "".join(section(statement(), "Assumed"))


@pytest.mark.parametrize("name", ["weights", "accumulation"])
def test_a_run_on_a_loader_with_replacement_says_what_it_assumes(name: str) -> None:
    model = nn.Linear(6, 3)
    engine = dptorch.PrivacyEngine(model, **SETTINGS)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    data = TensorDataset(torch.randn(64, 6), torch.zeros(64, dtype=torch.long))
    loader = DataLoader(data, batch_size=16, sampler=WeightedRandomSampler([1.0] * 64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, (x, y) in enumerate(loader):
            F.cross_entropy(model(x), y).backward()
            if name == "weights" or i % 2:
                optimizer.step()
                optimizer.zero_grad()
            else:
                optimizer.virtual_step()  # type: ignore[attr-defined]
    assert "provided that no example" in first_lines(engine.statement())


def test_a_seeded_run_protects_nobody() -> None:
    assert not statement(source=KeySource.SEED).private
    assert "protects nobody" in str(statement(source=KeySource.SEED))
    assert statement().private
    assert "protects nobody" not in str(statement())


def test_ordinary_training_is_not_described_as_noised() -> None:
    """Its steps are counted as planned, and none of them clipped or added noise."""
    plan = plan_of(noise_multiplier=0.0)
    text = str(make_statement(plan, 3, {plan.sampling: 0}, KeySource.OS, 0))
    assert "Mechanism            none: ordinary training" in text
    assert "clipped to" not in text
    assert "Sampling run         no step" in text


def test_privacy_is_not_read_off_the_words_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin looked for "not private" in the text; other words made a seeded run private."""
    monkeypatch.setattr(KeySource.SEED, "_value_", "a seed of the user's")
    assert not statement(source=KeySource.SEED).private


def test_a_resumed_run_says_that_branches_share_their_batches() -> None:
    text = str(statement(resumed=1)).replace("\n", " ")
    assert "resumed 1 times" in text
    assert "drew the same batches for the same steps" in text
    assert "smaller by sqrt(k)" in text
    assert "drew the same batches" not in str(statement())


def test_branches_of_a_checkpoint_say_so(tmp_path: Path) -> None:
    def build() -> dptorch.PrivacyEngine:
        model = nn.Linear(6, 3)
        engine = dptorch.PrivacyEngine(model, **SETTINGS)
        engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        return engine

    build().save_checkpoint(tmp_path / "run.pt")
    branch = build()
    branch.load_checkpoint(tmp_path / "run.pt")
    assert "cost more together than their epsilons added" in str(branch.statement()).replace(
        "\n", " "
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"unit": "user", "max_examples_per_user": 4}, "one user with all their examples"),
        ({"unit": "packed sequence"}, "NOT covered as a whole"),
        ({"sampling": "shuffled"}, "NOT valid for what ran"),
        ({"mechanism": "discrete_gaussian", "accountant": "rdp"}, "discrete Gaussian noise"),
        ({"adjacency": "replace-one"}, "replacing one example by another"),
    ],
)
def test_what_is_special_about_a_plan_is_said(settings: dict[str, Any], says: str) -> None:
    assert says in str(statement(**settings)).replace("\n", " ")


def test_text_and_dict_say_the_same() -> None:
    found = statement(own=1, resumed=2)
    values = json.loads(json.dumps(found.to_dict()))
    text = str(found)
    for key in ("assumed", "public", "not_covered"):
        assert all(item in text for item in values[key])
    assert values["epsilon"] == found.epsilon
    assert values["resumed"] == 2
    assert values["private_randomness"] is True
    assert PrivacyPlan.from_json(json.dumps(values["plan"])) == found.plan
