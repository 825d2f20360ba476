"""Statistics of a table: what its schema says is asked, and the answers are the table's."""

from __future__ import annotations

import csv
import datetime
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.tables.patients import SCHEMA, write

from dptorch.errors import ConfigurationError, DataError
from dptorch.statistics import Choice, Numeric, describe_table
from dptorch.statistics.tables import quantities_of
from dptorch.tables import Schema
from dptorch.tables.columns import is_empty
from dptorch.tables.schema import Unit

TABLE = Schema.from_dict(SCHEMA)


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("table") / "patients.csv", 2000)


def cells(path: Path, column: str) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [row[column] for row in csv.DictReader(file)]


def numbers(path: Path, column: str) -> np.ndarray:
    return np.array([np.nan if is_empty(cell) else float(cell) for cell in cells(path, column)])


def test_the_answers_are_the_tables(patients: Path) -> None:
    """At an ε so large that there is next to no noise."""
    found = describe_table(patients, TABLE, epsilon=1e5, delta=1e-5, bins=400, seed=0)
    assert set(found.summaries) == set(SCHEMA["columns"]) - {"patient_id", "notes"} | {"outcome"}
    ages = numbers(patients, "age")
    age = found["age"]
    assert age.mean == pytest.approx(np.nanmean(ages), abs=0.2)
    assert age.deviation == pytest.approx(np.nanstd(ages), abs=0.2)
    assert age.missing == pytest.approx(np.isnan(ages).mean(), abs=0.01)
    assert age.quantiles["0.5"] == pytest.approx(np.nanmedian(ages), abs=1.0)
    crp = numbers(patients, "crp")
    assert found["crp"].quantiles["0.25"] == pytest.approx(np.nanquantile(crp, 0.25), rel=0.05)
    for name, other in (("sex", "other"), ("outcome", None)):
        there = cells(patients, name)
        for value, count in found[name].counts.items():
            empty = sum(map(is_empty, there))
            wanted = empty if value == "missing" else there.count(value)
            assert value == other or count == pytest.approx(wanted, abs=2)
    days = [(datetime.date.fromisoformat(c) - datetime.date(1970, 1, 1)).days
            for c in cells(patients, "admitted")]  # fmt: skip
    assert found["admitted"].mean == pytest.approx(np.mean(days), abs=3)
    yes = cells(patients, "smoker").count("yes")
    assert found["smoker"].counts["yes"] == pytest.approx(yes, abs=2)


def test_a_person_is_a_unit_where_the_schema_says_so(patients: Path) -> None:
    schema = replace(TABLE, unit=Unit("patient_id", 3))
    found = describe_table(patients, schema, columns=["age"], epsilon=2.0, seed=0)
    plan = found.statement.plan
    assert (plan.unit, plan.sample_size) == ("user", len(set(cells(patients, "patient_id"))))


def test_what_was_read_off_the_data_is_said(patients: Path) -> None:
    schema = replace(TABLE, read_from_data=("bounds of age",))
    found = describe_table(patients, schema, columns=["age"], epsilon=2.0, seed=0)
    assert "without noise, to say what is public: bounds of age" in str(found)
    assert found.to_dict()["statement"]["read_from_data"] == ["bounds of age"]


def test_what_is_asked_is_what_the_schema_says() -> None:
    asked = {q.name: q for q in quantities_of(TABLE, None, 32)}
    assert asked["crp"] == Numeric("crp", (0.1, 500.0), missing=True, bins=32, log=True)
    assert asked["sex"] == Choice("sex", ("f", "m", "other", "missing"), missing=True)
    assert asked["smoker"].values == ("no", "yes", "missing")
    assert asked["outcome"] == Choice("outcome", ("discharged", "ward", "intensive"))
    assert [q.name for q in quantities_of(TABLE, ["outcome", "age"], 32)] == ["outcome", "age"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["notes"], "'notes' has no statistics"),
        (["patient_id"], "'patient_id' has no statistics"),
        (["ages"], "Did you mean 'age'"),
    ],
)
def test_columns_without_statistics_are_refused(columns: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        quantities_of(TABLE, columns, 32)


def test_a_number_without_bounds_is_refused() -> None:
    columns = {**TABLE.columns, "age": replace(TABLE.columns["age"], bounds=None)}
    with pytest.raises(ConfigurationError, match="no bounds for 'age'"):
        quantities_of(replace(TABLE, columns=columns), None, 32)
    assert quantities_of(replace(TABLE, columns=columns), ["sex"], 32)


def test_rows_that_do_not_fit_are_listed_and_none_is_left_out(tmp_path: Path) -> None:
    """The number of rows is published: without those that do not fit it would tell of cells."""
    path = write(tmp_path / "bad.csv", 30)
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace("20", "soon", 1)
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match="line 4, column 'admitted'"):
        describe_table(path, TABLE, epsilon=1.0)
    path.write_text(lines[0] + "\n")
    with pytest.raises(DataError, match="no rows"):
        describe_table(path, TABLE, epsilon=1.0)
