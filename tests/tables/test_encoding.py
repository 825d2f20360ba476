"""Rows become features one by one, and all that does not fit is in one message."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tables.patients import SCHEMA, rows, write

from dptorch.errors import DataError
from dptorch.tables import Preprocessing, Schema, chunk_of, encode, open_table
from dptorch.tables.faults import Faults

SCHEMA_OF_PATIENTS = Schema.from_dict(SCHEMA)


def features(table: list[dict[str, str]], schema: Schema = SCHEMA_OF_PATIENTS) -> torch.Tensor:
    encoded = encode(schema, [chunk_of(table)], Faults("rows"), labelled=False)
    return Preprocessing(schema).of(encoded.raw)


def test_what_a_row_becomes_depends_on_that_row_alone() -> None:
    """Other rows, their order and their number change no bit of it."""
    table = rows(200)
    together = features(table)
    order = list(range(200))
    random.Random(0).shuffle(order)
    assert torch.equal(features([table[i] for i in order]), together[order])
    for i in (0, 57, 199):
        assert torch.equal(features([table[i]]), together[i : i + 1])


def test_a_statistic_of_the_data_is_caught() -> None:
    """The broken twin: columns scaled by their own mean."""

    def scaled(table: list[dict[str, str]]) -> torch.Tensor:
        found = features(table)
        return found - found.mean(0)

    table = rows(200)
    assert not torch.equal(scaled(table[:100]), scaled(table)[:100])


def test_features_are_bounded_whatever_a_cell_says() -> None:
    table = [{**row, "age": "1e9", "crp": "1e-9", "admitted": "9999-01-01"} for row in rows(3)]
    found = features(table)
    assert found.dtype == torch.float32
    assert float(found.abs().max()) <= 1
    names = Preprocessing(SCHEMA_OF_PATIENTS).names
    assert found[:, names.index("age")].tolist() == [1.0] * 3
    assert found[:, names.index("crp")].tolist() == [-1.0] * 3


def test_gaps_are_filled_and_shown() -> None:
    names = Preprocessing(SCHEMA_OF_PATIENTS).names
    empty = {**rows(1)[0], **dict.fromkeys(("sex", "age", "temperature", "smoker", "crp"), "")}
    found = dict(zip(names, features([empty])[0].tolist(), strict=True))
    for column in ("sex", "age", "temperature", "smoker", "crp"):
        assert found[f"{column} is missing"] == 1
    assert found["age"] == 0  # 50 of 0 to 100
    assert found["temperature"] == 0
    assert found["smoker"] == 0
    assert found["crp"] == pytest.approx(0, abs=1e-6)
    assert [found[f"sex: {value}"] for value in ("f", "m", "other")] == [0, 0, 0]


def bad_table(path: Path) -> Path:
    """1,000 rows, 30 of which hold a fault."""
    write(path, 1000)
    lines = path.read_text().splitlines()
    for line in range(10, 310, 10):  # counted from 1, as an editor does
        cells = lines[line - 1].split(",")
        cells[1], cells[6] = ("soon", cells[6]) if line % 20 else (cells[1], "warm")
        lines[line - 1] = ",".join(cells)
    lines[499] = "too,short"
    path.write_text("\n".join(lines) + "\n")
    return path


def encoded(path: Path, **more: Any) -> Any:
    table = open_table(path)
    faults = Faults(str(path), table.place)
    return encode(SCHEMA_OF_PATIENTS, table.chunks(faults), faults, **more)


def test_the_first_twenty_faults_are_listed_and_all_counted(tmp_path: Path) -> None:
    path = bad_table(tmp_path / "bad.csv")
    with pytest.raises(DataError) as caught:
        encoded(path)
    head, *listed, way_out = str(caught.value).splitlines()
    assert head == f"{path}: 31 faults in 31 rows; the first 20:"
    assert len(listed) == 20
    assert listed[0] == "  line 10, column 'admitted': 'soon' is not a date such as 2026-02-28"
    assert listed[1] == "  line 20, column 'temperature': 'warm' is not a finite number"
    assert "--on-bad-row skip" in way_out


def test_rows_with_faults_can_be_left_out(tmp_path: Path) -> None:
    found = encoded(bad_table(tmp_path / "bad.csv"), skip=True, keep=["patient_id"])
    assert (len(found), found.skipped) == (969, 31)
    assert len(found.labels) == len(found.numbers) == len(found.kept["patient_id"]) == 969
    whole = encoded(write(tmp_path / "good.csv", 1000))
    good = [i for i, line in enumerate(whole.numbers) if line in set(found.numbers)]
    np.testing.assert_array_equal(whole.raw[good], found.raw)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'outcome'"):
        encoded(write(tmp_path / "t.csv", 10, label=False))
    with pytest.raises(DataError, match="no column 'admitted', 'age'"):
        features(
            [{k: v for k, v in row.items() if k not in ("age", "admitted")} for row in rows(2)]
        )


def test_tables_of_any_library_are_rows() -> None:
    pandas = pytest.importorskip("pandas")
    pyarrow = pytest.importorskip("pyarrow")
    table = rows(20)
    columns = {name: [row[name] for row in table] for name in table[0]}
    for given in (columns, pandas.DataFrame(columns), pyarrow.table(columns)):
        chunk = chunk_of(given)
        found = encode(SCHEMA_OF_PATIENTS, [chunk], Faults("rows"), labelled=False)
        assert torch.equal(Preprocessing(SCHEMA_OF_PATIENTS).of(found.raw), features(table))
    with pytest.raises(DataError, match="different lengths"):
        chunk_of({"a": [1, 2], "b": [1]})
    with pytest.raises(DataError, match="type int cannot be read"):
        chunk_of(3)
    with pytest.raises(DataError, match=r"array of shape \(2,\)"):
        chunk_of(torch.zeros(2).numpy(), ["a"])
