"""Rows from files of every format are the same rows; what is wrong in one is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dptorch.errors import DataError
from dptorch.text.rows import read_split, require_columns

ROWS = [{"text": f"row, number {i}", "label": str(i % 2)} for i in range(40)]


def as_csv(path: Path, delimiter: str = ",") -> None:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    content = file.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def as_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def as_directory(path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.csv": as_csv,
    "a.csv.gz": as_csv,
    "a.tsv": lambda path: as_csv(path, "\t"),
    "a.jsonl": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.parquet": as_parquet,
    "saved": as_directory,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    split = read_split(str(tmp_path / name), None, test_fraction=0.3, key=["text"])
    found = sorted((dict(row) for row in [*split.train, *split.test]), key=lambda r: r["text"])
    assert found == sorted(ROWS, key=lambda r: r["text"])
    assert 4 <= len(split.test) <= 20


def test_equal_texts_stay_on_one_side_and_removing_a_row_moves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def tests_of(rows: list[dict[str, str]]) -> set[str]:
        path.write_text("\n".join(json.dumps(row) for row in rows))
        split = read_split(str(path), None, test_fraction=0.3, key=["text"])
        assert not {r["text"] for r in split.train} & {r["text"] for r in split.test}
        return {row["text"] for row in split.test}

    whole = tests_of(ROWS + ROWS)
    assert tests_of(ROWS[1:]) == whole - {ROWS[0]["text"]}


def test_test_rows_come_from_a_file_or_a_part(tmp_path: Path) -> None:
    for part, rows in (("train", ROWS[:30]), ("test", ROWS[30:])):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    folder = read_split(str(tmp_path), None, test_fraction=0.3, key=["text"])
    files = [str(tmp_path / f"{part}.jsonl") for part in ("train", "test")]
    named = read_split(files[0], files[1], test_fraction=0.3, key=["text"])
    for split in (folder, named):
        assert (len(split.train), len(split.test)) == (30, 10)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is a list, not an object"),
        ("a.json", '{"text": "x"}', "expected a list of objects"),
        ("a.csv", "text,label\none,two,three\n", "row 0 has more or fewer cells"),
        ("a.pdf", "x", "cannot tell the format"),
        ("a.csv", "text,label\nx,1\n", "Both sides need some"),
    ],
)
def test_a_bad_file_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_split(str(tmp_path / name), None, test_fraction=0.3, key=["text"])


@pytest.mark.parametrize("value", [None, "", "  "])
def test_an_empty_text_is_named(value: str | None) -> None:
    with pytest.raises(DataError, match="row 1 is empty in column 'text'"):
        require_columns([{"text": "x"}, {"text": value}], ["text"], "rows")
