"""`dptorch statistics` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.commands import refused, run
from tests.tables.patients import SCHEMA, write
from tests.vision.files import write_cifar10

ASKED = ("statistics", "patients.csv", "--schema", "schema.json", "--columns", "age,sex")


@pytest.fixture
def patients() -> None:
    write(Path("patients.csv"), 300)
    Path("schema.json").write_text(json.dumps(SCHEMA))


@pytest.mark.slow
@pytest.mark.usefixtures("patients")
def test_a_table_has_statistics_that_are_charged_with_its_runs() -> None:
    done = run(*ASKED, "--epsilon", "2", "--dataset", "clinic", "--out", "found.json")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("age  mean ")
    assert "run " in done.output.partition("Ledger")[2]
    found = json.loads(Path("found.json").read_text())
    assert set(found["columns"]) == {"age", "sex"}
    assert found["statement"]["ledger"]["dataset"] == "clinic"
    assert found["statement"]["epsilon"] <= 2.0
    (total,) = json.loads(run("ledger", "total", "--json").output)
    assert total["dataset"] == "clinic"
    assert total["planned"] == pytest.approx(found["statement"]["epsilon"], rel=1e-3)
    (shown,) = json.loads(run("ledger", "show", "--json").output)
    assert shown["steps"] == 1
    assert run("ledger", "verify").exit_code == 0
    # A cap of the data set holds for it.
    assert run("ledger", "cap", "clinic", "--epsilon", "2.5", "--delta", "1e-4").exit_code == 0
    assert "Nothing was spent" in refused(run(*ASKED, "--epsilon", "2", "--dataset", "clinic"))


def test_channels_of_cifar() -> None:
    write_cifar10(Path("data"))
    done = run(
        "statistics", "data", "--format", "cifar10", "--epsilon", "5", "--no-ledger", "--json"
    )
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["columns"]) == ["red", "green", "blue"]
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("patients")
def test_json_has_nothing_before_it() -> None:
    """A data set that is new to the ledger is introduced elsewhere."""
    done = run(*ASKED, "--epsilon", "2", "--json")
    assert set(json.loads(done.stdout)["columns"]) == {"age", "sex"}
    assert "has an account of its own" in done.stderr


@pytest.mark.usefixtures("patients")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.csv",), "nowhere.csv does not exist"),
        (("patients.csv",), "dptorch schema patients.csv"),
        ((*ASKED[1:4], "--columns", "notes"), "--columns 'notes' has no statistics"),
        ((*ASKED[1:4], "--quantiles", "half"), "--quantiles 'half' must be levels"),
        ((*ASKED[1:4], "--quantiles", "1.5"), "between 0 and 1"),
        ((*ASKED[1:4], "--bins", "1"), "--bins 1 of 'admitted'"),
        ((*ASKED[1:4], "--mechanism", "laplace"), "mechanism"),
        ((*ASKED[1:4], "--delta", "2"), "delta"),
    ],
)
def test_what_cannot_be_released_is_refused(arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(run("statistics", *arguments, "--epsilon", "1", "--no-ledger"))
    assert not Path("runs").exists()
