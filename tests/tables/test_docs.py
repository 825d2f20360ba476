"""What docs/tables.md prints works as printed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from tests.cli.commands import run
from tests.source import REPOSITORY
from tests.tables.patients import SCHEMA, rows, write

from dptorch.tables import Schema
from dptorch.tables.columns import KINDS

PAGE = (REPOSITORY / "docs" / "tables.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_schema_of_the_page_is_one() -> None:
    (text,) = blocks("json")
    schema = Schema.from_dict(json.loads(text))
    assert {type(column) for column in schema.columns.values()} == set(KINDS.values())
    assert schema.unit is not None
    for kind in KINDS:
        assert f"`{kind}`" in PAGE


@pytest.mark.slow
def test_the_commands_and_the_code_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("patients.csv"), 300)
    write(Path("new.csv"), 10, seed=1, label=False)
    filled = Path("filled.json")
    described = json.loads(blocks("json")[0])
    described = {**SCHEMA, "columns": {**SCHEMA["columns"]}, "unit": described["unit"]}
    filled.write_text(json.dumps(described))
    monkeypatch.setenv("VISUAL", "cp filled.json")
    commands = re.findall(r"^    (dptorch .*)$", PAGE, re.MULTILINE)
    commands = sorted(commands, key=lambda command: "predict" in command)
    commands.append(re.findall(r"`(dptorch release .*?)`", PAGE)[0])
    assert [shlex.split(c)[1] for c in commands] == [
        "schema",
        "train",
        "train",
        "predict",
        "release",
    ]
    for command in commands:
        extra = ["--epochs", "1", "--noise-multiplier", "2"] if " train " in command else []
        done = run(*shlex.split(command)[1:], *extra)
        assert done.exit_code == 0, done.output
    assert len(Path("predictions.csv").read_text().splitlines()) == 11
    pandas = pytest.importorskip("pandas")
    code, _ = blocks("python")
    # The row of the page leaves out columns to be short.
    row = {name: value for name, value in rows(1)[0].items() if name != "outcome"}
    code = code.replace('[{"age"', '[{**row, "age"')
    exec(compile(code, "tables.md", "exec"), {"dataframe": pandas.DataFrame(rows(5)), "row": row})


@pytest.mark.slow
def test_the_estimators_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = datasets.load_digits(return_X_y=True)
    code = blocks("python")[1].replace("epsilon=3.0", "noise_multiplier=2.0, epochs=1")
    exec(compile(code, "tables.md", "exec"), {"X": X[:300], "y": y[:300], "X_new": X[300:310]})
    assert "differentially private" in capsys.readouterr().out
