"""A proposed schema comes from names and types; what is read off the data says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.tables.patients import CLASSES, REGIONS, rows, write

from dptorch.errors import ConfigurationError
from dptorch.tables import Schema, propose
from dptorch.tables.proposing import proposal_text, read_off


def test_a_proposal_knows_nothing_of_the_values(tmp_path: Path) -> None:
    """Other patients, the same proposal, and no value of theirs in it."""
    first, looked = propose(write(tmp_path / "a.csv", 300), "outcome", unit="patient_id")
    second, _ = propose(write(tmp_path / "b.csv", 150, seed=5), "outcome", unit="patient_id")
    assert first == second
    text = proposal_text(first)
    assert json.loads(text) == first
    values = {v for row in rows(300) for v in row.values() if len(v) > 3}
    words = set(re.findall(r"\w+", text))
    assert words & {"kind", "category", "region"}
    assert not words & values
    assert looked == ["which columns hold numbers, dates or words, in the first 200 rows"]
    assert first["unit"] == {"column": "patient_id", "max_rows": 1}


def test_names_suggest_what_anyone_would_say(tmp_path: Path) -> None:
    found, _ = propose(write(tmp_path / "a.csv", 50), "outcome")
    kinds = {name: column["kind"] for name, column in found["columns"].items()}
    assert kinds == {
        "patient_id": "drop",
        "admitted": "date",
        "sex": "category",
        "age": "number",
        "region": "category",
        "smoker": "boolean",
        "temperature": "number",
        "oxygen": "number",
        "crp": "number",
        "notes": "drop",
    }
    assert found["columns"]["age"]["bounds"] == [0, 120]
    assert found["columns"]["oxygen"]["bounds"].startswith("FILL IN")
    with pytest.raises(ConfigurationError, match="still to be filled in"):
        Schema.from_dict(found)


def test_parquet_states_its_types(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"x": [1.5], "flag": [True], "word": ["a"], "y": ["b"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    found, looked = propose(tmp_path / "t.parquet", "y")
    assert [c["kind"] for c in found["columns"].values()] == ["number", "boolean", "category"]
    assert looked == []


def test_what_is_read_off_the_data_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 400)
    found = read_off(propose(path, "outcome")[0], path)
    columns: dict[str, Any] = found.to_dict()["columns"]
    ages = [float(row["oxygen"]) for row in rows(400) if row["oxygen"] not in ("", "NA")]
    assert columns["oxygen"]["bounds"] == [min(ages), max(ages)]
    assert columns["region"]["values"] == sorted(REGIONS)
    assert found.label.classes == tuple(sorted(CLASSES))
    assert found.read_from_data[1:] == (
        "bounds of admitted",
        "values of region",
        "bounds of oxygen",
        "bounds of crp",
        "classes of outcome",
    )
    assert "bounds of age" not in found.read_from_data  # its name told


def test_a_label_of_many_numbers_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("age,price\n" + "".join(f"{i},{i * 1.5}\n" for i in range(40)))
    found = read_off(propose(path, "price")[0], path)
    assert found.label.bounds == (0, 58.5)


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'outcome'"):
        propose(write(tmp_path / "a.csv", 5), "outcom")
