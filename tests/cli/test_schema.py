"""`dptorch schema` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.commands import refused, run
from tests.tables.patients import write


def test_a_proposal_says_what_is_left_to_fill_in() -> None:
    write(Path("patients.csv"), 30, separator=";")
    done = run("schema", "patients.csv", "--label", "outcome", "--unit-column", "patient_id")
    assert done.exit_code == 0, done.output
    found = json.loads(Path("patients.schema.json").read_text())
    left = json.dumps(found).count('"FILL IN')
    assert f"patients.schema.json: {left} places to fill in" in done.stderr
    assert found["unit"]["column"] == "patient_id"
    assert "exists" in refused(run("schema", "patients.csv", "--label", "outcome"))
    message = run("train", "--data", "patients.csv", "--schema", "patients.schema.json").stderr
    assert message.count("still to be filled in") == left
    assert len(message.splitlines()) == left + 1


def test_reading_off_the_data_is_said() -> None:
    write(Path("patients.csv"), 200)
    done = run("schema", "patients.csv", "--label", "outcome", "--from-data", "--out", "s.json")
    assert done.exit_code == 0, done.output
    assert "Read off the data, so not covered by ε: bounds of oxygen" in done.stderr
    assert "s.json is complete" in done.stderr
    assert "bounds of oxygen" in json.loads(Path("s.json").read_text())["read_from_data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.csv",), "nowhere.csv does not exist"),
        (("patients.csv", "--label", "outcom"), "Did you mean 'outcome'?"),
        (("patients.csv", "--from-data"), "--from-data needs --label"),
        (("patients.csv", "--out", "no/such/s.json"), "cannot be written"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    write(Path("patients.csv"), 5)
    assert message in refused(run("schema", *arguments))
    assert not Path("patients.schema.json").exists()


@pytest.mark.parametrize(
    ("editor", "message"), [("false", "ended with 1"), ("/no/such/editor", "cannot be started")]
)
def test_an_editor_that_fails(editor: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUAL", editor)
    write(Path("patients.csv"), 5)
    assert message in refused(run("schema", "patients.csv", "--edit"))
