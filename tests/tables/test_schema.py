"""A schema as a file: what it says, and everything that is wrong with it at once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tests.tables.patients import SCHEMA, write_schema

from dptorch.errors import ConfigurationError
from dptorch.tables import Schema
from dptorch.tables.columns import Number


def test_a_schema_comes_back_as_it_was(tmp_path: Path) -> None:
    whole = {
        **SCHEMA,
        "label": {**SCHEMA["label"], "weights": {"intensive": 3}},
        "unit": {"column": "patient_id", "max_rows": 2},
        "file": {"separator": ";", "encoding": "latin-1", "decimal": ","},
        "read_from_data": ["bounds of age"],
    }
    schema = Schema.read(write_schema(tmp_path / "s.json", **whole))
    assert Schema.from_dict(schema.to_dict()) == schema
    assert Schema.from_dict(json.loads(schema.to_json())) == schema
    assert schema.unit is not None
    assert schema.unit.max_rows == 2
    assert schema.columns["age"] == Number((0, 100), missing=True, fill=50, decimal=",")


def wrong(path: str, value: Any) -> dict[str, Any]:
    """`SCHEMA` with one value changed."""
    schema = copy.deepcopy(SCHEMA)
    *parents, last = path.split("/")
    place: Any = schema
    for key in parents:
        place = place[key]
    place[last] = value
    return schema


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dptorch_schema", 2, "this version reads 1"),
        ("label", None, "label: is missing"),
        ("label/column", "", "is not the name of a column"),
        ("label/classes", ["a"], "at least 2 different names"),
        ("label/classes", "FILL IN: the classes", "label.classes: is still to be filled in"),
        ("label/weights", {"cured": 2}, "'cured' is not a class"),
        ("label/weights", {"ward": 0}, "ward: 0 is not a positive number"),
        ("label/bounds", [0, 1], "exclude classes"),
        ("label/classses", [], "'classses' is not known"),
        ("unit", {"column": "id", "max_rows": 0}, "unit.max_rows: 0 is not a positive integer"),
        ("columns", None, "columns: is missing"),
        ("columns", {"a": {"kind": "drop"}}, "all are dropped"),
        ("columns/outcome", {"kind": "drop"}, "columns.outcome: is the label too"),
        ("columns/age", {"kind": "nmber"}, "kind 'nmber' is not one of number"),
        ("columns/age", {"kind": "number", "bounds": [9, 1]}, "columns.age.bounds: .*low < high"),
        ("columns/age", {"kind": "number", "bounds": "FILL IN: it"}, "still to be filled in"),
        ("columns/age", {"kind": "number", "missing": True}, "needs bounds or a fill"),
        ("columns/age", {"kind": "number", "missing": "yes"}, "'yes' is neither true nor false"),
        ("columns/age", {"kind": "number", "bounds": [0, 9], "log": True}, "needs positive bounds"),
        ("columns/age", {"kind": "number", "fill": "x"}, "columns.age.fill: 'x' is not a finite"),
        ("columns/sex", {"kind": "category", "values": ["f", "f"]}, "different names"),
        ("columns/sex", {"kind": "category"}, "None is not a list of names"),
        ("columns/smoker", {"kind": "boolean", "true": ["0"]}, "'0' is true and false"),
        ("columns/admitted", {"kind": "date", "bounds": ["2020", "x"]}, "pair of dates"),
        ("columns/notes", {"kind": "text", "buckets": -1}, "-1 is not a positive integer"),
        ("file", {"encoding": "utf8-9"}, "not an encoding"),
        ("file", {"separator": ";;"}, "is not one character"),
        ("file", {"decimal": "'"}, "neither"),
        ("read_from_data", "ages", "is not a list of texts"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Schema.from_dict(wrong(path, value))


def test_everything_wrong_is_in_one_message() -> None:
    schema = wrong("columns/age", {"kind": "number", "bounds": 3})
    schema["label"]["classes"] = ["one"]
    schema["columns"]["sex"] = {"kind": "set"}
    with pytest.raises(ConfigurationError) as caught:
        Schema.from_dict(schema, "s.json")
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()] == [
        "s.json",
        "label.classes",
        "columns.sex",
        "columns.age.bounds",
    ]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{", "not JSON"), ("[]", "not an object")]
)
def test_files_that_are_no_schema(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        Schema.read(path)
