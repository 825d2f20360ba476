"""What a data set is called says nothing about its records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dptorch.errors import ConfigurationError, DataError
from dptorch.ledger import beside
from dptorch.ledger.dataset_id import named, neighbours, nested, of_path, sidecar_of
from tests.ledger.processes import shared, spawn, wait


def test_it_is_drawn_once_and_does_not_depend_on_the_data(tmp_path: Path) -> None:
    data = tmp_path / "patients.csv"
    data.write_text("age\n41\n")
    found = beside(data)
    data.write_text("age\n41\n97\n")
    assert beside(data) == beside(str(data)) == found
    assert json.loads(sidecar_of(data).read_text())["dataset"] == found
    twin = tmp_path / "twin.csv"
    twin.write_text("age\n41\n97\n")
    assert beside(twin) != found, "equal data has equal fingerprints: guesses could be tested"


def test_a_folder_and_a_path_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    found = beside(photos)
    monkeypatch.chdir(photos)
    assert beside(".") == beside("../photos/") == found
    assert list(photos.iterdir()) == [], "nothing may be written among the records"


def test_processes_that_begin_at_once_agree(tmp_path: Path) -> None:
    data = tmp_path / "x.npz"
    table = shared((8, 1))

    def draw(row: int) -> None:
        table[row, 0] = int(beside(data)[3:10], 16)

    assert [wait(pid) for pid in [spawn(lambda i=i: draw(i)) for i in range(8)]] == [0] * 8
    assert len(set(table[:, 0])) == 1
    assert [p.name for p in tmp_path.iterdir()] == [sidecar_of(data).name]


@pytest.mark.parametrize("content", ["", "{}", '{"dataset": ""}', "[1]"])
def test_a_damaged_identity_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    sidecar = sidecar_of(tmp_path / "x.csv")
    sidecar.write_text(content)
    with pytest.raises((DataError, ConfigurationError), match="data set"):
        beside(tmp_path / "x.csv")
    assert sidecar.read_text() == content


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--dataset NAME"):
        beside(tmp_path / "file" / "x.csv")


@pytest.mark.parametrize("name", ["", " x", "x ", "a\nb", "a\n", "x" * 201, "a\x1b[31m"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigurationError, match="name is public"):
        named(name)


def test_neighbours_are_other_data_with_an_identity(tmp_path: Path) -> None:
    for name in ("patients.csv", "patients.parquet", "gone.csv", "new.csv"):
        (tmp_path / name).write_text("age\n41\n")
    known = {name: beside(tmp_path / name) for name in ("patients.csv", "patients.parquet")}
    beside(tmp_path / "gone.csv")
    (tmp_path / "gone.csv").unlink()
    sidecar_of(tmp_path / "new.csv").write_text("{}")
    assert neighbours(tmp_path / "x.csv") == known
    assert neighbours(tmp_path / "patients.csv") == {"patients.parquet": known["patients.parquet"]}


def test_folders_in_each_other_are_found_from_either_side(tmp_path: Path) -> None:
    outer = tmp_path / "data"
    inner = outer / "cifar-10-batches-py"
    (inner / "deeper").mkdir(parents=True)
    assert nested(outer) == nested(inner) == {}
    name = beside(outer)
    for inside in (inner, inner / "deeper", inner / "deeper" / "rows.csv"):
        assert nested(inside) == {str(outer): name}
        assert neighbours(inside) == {}
    assert nested(outer) == {}
    of_inner = beside(inner)
    assert nested(outer) == {str(inner): of_inner}
    assert (of_path(inner), of_path(tmp_path / "other")) == (of_inner, None)
