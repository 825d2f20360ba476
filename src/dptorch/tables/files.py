"""Read tables from files chunk by chunk: text by the standard library, Parquet by pyarrow."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from dptorch.errors import ConfigurationError, DataError
from dptorch.tables.columns import Cells
from dptorch.tables.faults import Faults
from dptorch.tables.schema import FileFormat

__all__ = ["Chunk", "Table", "is_table", "open_table"]

#: Rows that are read and turned into numbers at once.
CHUNK: Final = 20_000
_TEXT: Final = (".csv", ".tsv", ".txt")
_PARQUET: Final = (".parquet", ".pq")
_SEPARATORS: Final = ",;\t|"


@dataclass(frozen=True)
class Chunk:
    """Some rows of a table.

    Attributes:
        columns: the cells of each column by name, all of one length.
        numbers: of each row, as messages name it.
    """

    columns: Mapping[str, Cells]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class Table:
    """A table to be read once.

    Attributes:
        source: the file, for messages.
        names: of the columns, in order.
        place: what rows are numbered by: "line" or "row".
        types: of the columns, where the file says: "number", "boolean", "date", "text".
        chunks: reads it; rows with a wrong number of fields go to the faults.
    """

    source: str
    names: tuple[str, ...]
    place: str
    types: Mapping[str, str]
    chunks: Callable[[Faults], Iterator[Chunk]]


def is_table(path: Path) -> bool:
    """Whether the name of a file is that of a table.

    Example:
        >>> [is_table(Path(n)) for n in ("a.csv", "a.CSV.gz", "a.pq", "a.npz")]
        [True, True, True, False]
    """
    return _suffix(path) is not None


def _suffix(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in (*_PACKED, ".zst"):
        suffixes.pop()
    elif len(suffixes) == 2:
        suffixes = suffixes[1:]
    return suffixes[-1] if suffixes and suffixes[-1] in _TEXT + _PARQUET else None


def open_table(path: Path, file: FileFormat | None = None) -> Table:
    """Open a table by the ending of its name: .csv, .tsv, .txt (also .gz, .bz2, .xz, .zip, .zst) or
    .parquet, .pq.

    Raises:
        DataError: it cannot be read, or has no header, or two columns of one name.
        ConfigurationError: a package for this format is missing.
    """
    table = _parquet(path) if _suffix(path) in _PARQUET else _text(path, file or FileFormat())
    for name in table.names:
        if table.names.count(name) > 1:
            raise DataError(
                f"{path}: {table.names.count(name)} columns are called {name!r}. Expected one."
            )
    return table


# -- text ----------------------------------------------------------------------------------------


def _first_of_zip(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.endswith("/")]
    if len(names) != 1:
        raise DataError(f"{path}: {len(names)} files in the archive. Expected one.")
    return archive.open(names[0])


def _zst(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise _missing("Reading .zst", "pyarrow") from error
    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


_PACKED: Final[Mapping[str, Callable[[Path], Any]]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zip": _first_of_zip,
    ".zst": _zst,
}


def _bytes(path: Path) -> Any:
    return _PACKED.get(path.suffix.lower(), Path.open)(path, **_mode(path))


def _mode(path: Path) -> dict[str, Any]:
    return {} if path.suffix.lower() in (".zip", ".zst") else {"mode": "rb"}


def _encoding(path: Path, file: FileFormat) -> str:
    if file.encoding is not None:
        return file.encoding
    with closing(_bytes(path)) as raw:
        mark = raw.read(2)
    return "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


@contextmanager
def _readable(path: Path, line: Callable[[], int]) -> Iterator[None]:
    """Turn what goes wrong in reading into an error that names the file and the line."""
    try:
        yield
    except UnicodeError as error:
        raise DataError(
            f"{path}, after line {line()}: not UTF-8 text, or not of the encoding that was given "
            f"({error}). Say which it is in the schema: "
            '"file": {"encoding": "latin-1"}.'
        ) from error
    except (OSError, EOFError, csv.Error, zipfile.BadZipFile, lzma.LZMAError) as error:
        raise DataError(f"{path}, after line {line()}: cannot be read ({error}).") from error


def _separator(header: str) -> str:
    """What separates the fields of a header line.

    Example:
        >>> _separator('name;"a,b,c";age'), _separator("age")
        (';', ',')
    """
    bare = re.sub(r'"[^"]*"', "", header)
    return max(_SEPARATORS, key=lambda mark: (bare.count(mark), -_SEPARATORS.index(mark)))


def _rows(path: Path, file: FileFormat) -> Generator[tuple[int, list[str]], None, None]:
    """The fields of each line that is not blank, with the number of the line; the header first."""
    line = 0
    with _readable(path, lambda: line), closing(_bytes(path)) as raw:
        text = io.TextIOWrapper(raw, encoding=_encoding(path, file), newline="")
        first = text.readline()
        separator = file.separator or _separator(first)

        def lines() -> Iterator[str]:
            yield first
            yield from text

        reader = csv.reader(lines(), delimiter=separator, strict=True)
        for row in reader:
            line = reader.line_num
            if row:
                yield line, row


def _text(path: Path, file: FileFormat) -> Table:
    with closing(_rows(path, file)) as rows:
        header = next(rows, (1, []))[1]
    names = tuple(name.strip() for name in header)

    def chunks(faults: Faults) -> Iterator[Chunk]:
        rows = _rows(path, file)
        next(rows, None)
        numbers: list[int] = []
        held: list[list[str]] = []
        for line, row in rows:
            if len(row) != len(names):
                faults.add(line, None, f"{len(row)} fields, but the header has {len(names)}")
                continue
            numbers.append(line)
            held.append(row)
            if len(held) == CHUNK:
                yield _chunk(names, held, numbers)
                numbers, held = [], []
        if held:
            yield _chunk(names, held, numbers)

    return Table(str(path), names, "line", {}, chunks)


def _chunk(names: Sequence[str], rows: list[list[str]], numbers: list[int]) -> Chunk:
    return Chunk(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), numbers)


# -- Parquet -------------------------------------------------------------------------------------


def _parquet(path: Path) -> Table:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise _missing("Reading Parquet", "pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        arrow = file.schema_arrow
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error

    def chunks(faults: Faults) -> Iterator[Chunk]:
        row = 0
        try:
            for batch in file.iter_batches(batch_size=CHUNK):
                cells = {
                    str(name): _cells(column)
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
                yield Chunk(cells, range(row, row + batch.num_rows))
                row += batch.num_rows
        except (ArrowException, OSError) as error:
            raise DataError(f"{path}, after row {row}: cannot be read ({error}).") from error

    types = {str(f.name): _type(f.type) for f in arrow}
    return Table(str(path), tuple(str(n) for n in arrow.names), "row", types, chunks)


def _cells(column: Any) -> Cells:
    from pyarrow import types

    if (types.is_integer(column.type) or types.is_floating(column.type)) and not column.null_count:
        return np.asarray(column.to_numpy(zero_copy_only=False))
    return list(column.to_pylist())


def _type(arrow: Any) -> str:
    from pyarrow import types

    if types.is_boolean(arrow):
        return "boolean"
    if types.is_integer(arrow) or types.is_floating(arrow) or types.is_decimal(arrow):
        return "number"
    if types.is_date(arrow) or types.is_timestamp(arrow):
        return "date"
    return "text"


def _missing(what: str, package: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what} needs the package {package}. Install it with: pip install 'dptorch[report]'"
    )
