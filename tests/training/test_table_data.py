"""A table as training and test examples."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tables.patients import SCHEMA, rows, write, write_schema

from dptorch.errors import ConfigurationError, DataError
from dptorch.training.data import ReadOptions, TableFacts, TrainTest
from dptorch.training.job import Job, prepare
from dptorch.training.readers import load_data


def load(tmp_path: Path, count: int = 300, *, changes: Any = (), **options: Any) -> TrainTest:
    data = write(tmp_path / "patients.csv", count)
    schema = write_schema(tmp_path / "s.json", **dict(changes))
    return load_data(data, ReadOptions(schema=str(schema), **options))


def facts(data: TrainTest) -> TableFacts:
    assert data.table is not None
    return data.table


def test_a_table_by_its_schema(tmp_path: Path) -> None:
    data = load(tmp_path)
    assert data.classes == ("discharged", "ward", "intensive")
    assert sum(data.sizes) == 300
    assert data.input_shape == (37,)
    assert data.preparation == {"kind": "table"}
    train: Any = data.train
    assert float(train.inputs.abs().max()) <= 1
    counts = torch.cat([train.labels, data.test.labels]).bincount()  # type: ignore[attr-defined]
    names = [row["outcome"] for row in rows(300)]
    assert counts.tolist() == [names.count(name) for name in data.classes]


def stays(path: Path, people: int, each: int) -> Path:
    """A table in which each person has several rows."""
    table = [
        {**row, "patient_id": f"P{i % people}"} for i, row in enumerate(rows(people * each, seed=2))
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def test_a_unit_is_on_one_side(tmp_path: Path) -> None:
    path = stays(tmp_path / "stays.csv", 60, 5)
    schema = str(write_schema(tmp_path / "s.json"))
    data = load_data(path, ReadOptions(schema=schema, unit_column="patient_id"))
    units = facts(data).units
    assert units is not None
    assert data.sizes[0] == len(units) == 5 * data.records
    assert data.sizes[1] == 300 - len(units)
    # Nobody else moves when a person leaves.
    gone = units[0]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(f"{gone},")))
    fewer = load_data(path, ReadOptions(schema=schema, unit_column="patient_id"))
    assert set(facts(fewer).units or ()) == set(units) - {gone}


def test_a_split_by_rows_parts_people(tmp_path: Path) -> None:
    """The broken twin: without a unit, rows of one person are on both sides."""
    path = stays(tmp_path / "stays.csv", 60, 5)
    schema = str(write_schema(tmp_path / "s.json"))
    assert load_data(path, ReadOptions(schema=schema)).sizes[0] % 5


def test_the_plan_protects_units_and_bounds_their_rows(tmp_path: Path) -> None:
    path = stays(tmp_path / "stays.csv", 60, 5)
    schema = write_schema(tmp_path / "s.json", unit={"column": "patient_id", "max_rows": 2})
    reading = ReadOptions(schema=str(schema))
    setup = prepare(Job(data=str(path), reading=reading, epochs=1, noise_multiplier=1.0, seed=0))
    plan = setup.engine.plan
    assert (plan.unit, plan.max_examples_per_user) == ("user", 2)
    assert plan.sample_size == setup.data.records < 60
    with pytest.raises(ConfigurationError, match="the schema has a unit"):
        prepare(Job(data=str(path), reading=reading, canaries=50))


def test_weights_of_classes_are_public_constants(tmp_path: Path) -> None:
    label = {**SCHEMA["label"], "weights": {"intensive": 4}}
    data = load(tmp_path, changes={"label": label})
    from dptorch.training.table_tasks import task_of

    task = task_of(data)
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 2, 0, 0])
    by_hand = torch.stack(
        [
            (4.0 if y == 2 else 1.0) * -torch.log_softmax(logits[i], 0)[y]
            for i, y in enumerate(labels)
        ]
    ).mean()
    loss, examples = task.loss(torch.nn.Identity(), (logits, labels), torch.device("cpu"))
    torch.testing.assert_close(loss, by_hand)
    assert examples == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit_column": "doctor"}, "unit_column='doctor' is not in"),
        ({"subgroups": "sex,ward"}, "no column 'ward'"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises((ConfigurationError, DataError), match=message):
        load(tmp_path, **options)


def test_a_schema_and_a_table_that_do_not_fit(tmp_path: Path) -> None:
    columns = {k: v for k, v in SCHEMA["columns"].items() if k != "notes"}
    with pytest.raises(ConfigurationError, match=r"says nothing of 'notes'.*\"drop\""):
        load(tmp_path, changes={"columns": columns})
    more = {**SCHEMA["columns"], "pulse": {"kind": "number", "bounds": [20, 250]}}
    with pytest.raises(DataError, match="no column 'pulse'"):
        load(tmp_path, changes={"columns": more})
    label = {"column": "outcome", "classes": ["discharged", "ward"]}
    with pytest.raises(DataError, match="'intensive' is not one of discharged, ward"):
        load(tmp_path, changes={"label": label})
    with pytest.raises(ConfigurationError, match="the unit of the schema is 'patient_id'"):
        load(tmp_path, changes={"unit": {"column": "patient_id"}}, unit_column="age")


def test_classes_that_were_read_off_the_data_are_said(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,kind\n" + "".join(f"{i},{i % 2}\n" for i in range(50)))
    data = load_data(tmp_path / "t.csv", ReadOptions(label="kind"))
    assert facts(data).schema.read_from_data == ("classes of kind",)
    assert facts(data).schema.label.classes == ("0", "1")
