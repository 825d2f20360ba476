"""PrivacyArguments: the plan's own names, from a command line too, and what cannot be meant."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("transformers")

from transformers import HfArgumentParser

from dptorch.errors import ConfigurationError
from dptorch.integrations.transformers import PrivacyArguments
from dptorch.plan import PlanSettings, PrivacyPlan


def test_names_and_defaults_are_the_plans():
    mine = {f.name: f.default for f in dataclasses.fields(PrivacyArguments)}
    of_the_plan = {f.name: f.default for f in dataclasses.fields(PrivacyPlan)}
    shared = mine.keys() & PlanSettings.__annotations__.keys() & of_the_plan.keys()
    same = shared - {"max_grad_norm", "noise_multiplier", "target_delta", "adjacency"}
    assert len(same) >= 8
    assert {n: mine[n] for n in same} == {n: of_the_plan[n] for n in same}


def test_it_is_read_from_a_command_line():
    words = "--target_epsilon 3 --target_delta 1e-6 --user_column uid --max_examples_per_user 4"
    (read,) = HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses(words.split())
    assert read == PrivacyArguments(
        target_epsilon=3.0, target_delta=1e-6, user_column="uid", max_examples_per_user=4
    )
    assert read.unit == "user"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_epsilon": 1.0}, "target_delta is missing"),
        ({"target_delta": 1e-5}, "give exactly one"),
        ({"target_delta": 1e-5, "target_epsilon": 1.0, "noise_multiplier": 1.0}, "exactly one"),
        ({"target_delta": 1e-5, "target_epsilon": 1.0, "unit": "usr"}, "Did you mean 'user'"),
        ({"target_delta": 1e-5, "target_epsilon": 1.0, "unit": "user"}, "name of the column"),
        (
            {
                "target_delta": 1e-5,
                "target_epsilon": 1.0,
                "unit": "packed sequence",
                "user_column": "u",
            },
            "name of the column",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        PrivacyArguments(**settings)
