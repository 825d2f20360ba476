"""The statement of a release says what a training run's does, as far as it applies."""

from __future__ import annotations

import numpy as np

from dptorch.statistics import Choice, Numeric, describe

ASKED = [Numeric("age", (0.0, 120.0)), Choice("sex", ("f", "m"))]
VALUES = {"age": np.arange(100.0), "sex": np.arange(100) % 2}


def test_everything_that_a_reader_asks_is_answered() -> None:
    found = describe(ASKED, VALUES, epsilon=1.0, delta=1e-4, mechanism="gaussian")
    text, values = str(found.statement), found.statement.to_dict()
    for part in (
        "(1.0000, 0.0001)-differentially private",
        "replacing one example by one that contributes nothing",
        "was in the data. They have the statistics, know every other example",
        "central: whoever makes the release sees the data",
        "one, not interactive",
        "key from the operating system",
        "Ledger               none",
        "number of examples 100",
        "age: bounds 0 to 120, 64 bins",
        "sex: the values f, m",
        "without differential privacy",
        "floating-point",
    ):
        assert part in text
    assert values["private_randomness"] is True
    assert values["not_covered"] == found.statement.not_covered
    assert values["epsilon"] <= 1.0


def test_exact_noise_has_no_floating_point_to_attack() -> None:
    found = describe(ASKED, VALUES, epsilon=1.0, delta=1e-4, seed=1)
    assert "floating-point" not in str(found.statement)
    assert "protects nobody" in str(found.statement)
    assert found.statement.to_dict()["private_randomness"] is False
