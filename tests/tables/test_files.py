"""Text files however they are separated, encoded and packed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dptorch.errors import DataError
from dptorch.tables import open_table
from dptorch.tables.faults import Faults
from dptorch.tables.files import FileFormat, Table

ROWS = [["näme", "age", "note"], ["Ada", "36", "a,b;c"], ["Bo", "41", 'said "no"\nand left']]


def cells(table: Table) -> list[list[str]]:
    """The header and the rows."""
    found = [list(table.names)]
    for chunk in table.chunks(Faults(table.source, table.place)):
        found += [list(row) for row in zip(*chunk.columns.values(), strict=True)]
    return found


def text(separator: str) -> str:
    def quoted(cell: str) -> str:
        return '"' + cell.replace('"', '""') + '"' if set(cell) & set('",;\n\t|') else cell

    return "".join(separator.join(map(quoted, row)) + "\n" for row in ROWS)


@pytest.mark.parametrize("separator", list(",;\t|"))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_marked_encodings_are_recognised(
    tmp_path: Path, separator: str, encoding: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text(separator).encode(encoding))
    assert cells(open_table(path)) == ROWS


def test_other_encodings_are_said(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(text(";").encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8.*\"encoding\": \"latin-1\""):
        cells(open_table(path))
    assert cells(open_table(path, FileFormat(encoding="latin-1"))) == ROWS


def zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("t.csv", data)
    return out.getvalue()


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zip", zipped)],
)
def test_packed_files(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"t.csv{suffix}"
    path.write_bytes(pack(text(",").encode()))
    assert cells(open_table(path)) == ROWS
    path.write_bytes(pack(text(",").encode())[:20])
    with pytest.raises(DataError, match="cannot be read"):
        cells(open_table(path))


def test_zst_is_read_by_pyarrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "t.csv.zst"
    with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
        out.write(text(",").encode())
    assert cells(open_table(path)) == ROWS


def test_rows_of_another_length_are_faults_by_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n\n1\n3,4\n5,6,7\n")
    table = open_table(path)
    faults = Faults(table.source, table.place)
    (chunk,) = table.chunks(faults)
    assert (list(chunk.numbers), faults.rows) == ([2, 5], {4, 6})


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match="2 columns are called 'a'"):
        open_table(path)
