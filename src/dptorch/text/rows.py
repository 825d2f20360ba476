"""Rows of text from CSV, TSV, JSON, Parquet, a directory that `datasets` saved, or the hub.

A row is a mapping from column to value. Files are read into memory and nowhere else: no copy of private
data is left in a cache.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dptorch.errors import ConfigurationError, DataError
from dptorch.training.data import is_held_out, refuse_empty
from dptorch.training.reviews import CLASSES, review_split, snippets

__all__ = ["Split", "movie_reviews", "read_rows", "read_split", "require_columns", "split_rows"]

Row = Mapping[str, Any]
HUB: Final = "hub:"
_TEST_NAMES: Final = ("test", "validation", "validation_matched", "dev")
_FORMATS: Final = (".csv", ".csv.gz", ".tsv", ".jsonl", ".json", ".parquet", ".pq")


@dataclass(frozen=True)
class Split:
    """Training and test rows.

    Attributes:
        train, test: the rows, in the order of the file.
        source: one line for the report.
    """

    train: Sequence[Row]
    test: Sequence[Row]
    source: str


def read_split(
    data: str, test: str | None, *, test_fraction: float, key: Sequence[str], test_name: str = ""
) -> Split:
    """Read the rows of `data` and hold some out.

    Args:
        data: a file; a directory that `datasets` saved; or ``hub:NAME`` or ``hub:NAME:CONFIG``, which
            is downloaded.
        test: a file of test rows.
        test_fraction: held out where there is neither such a file nor a test part in `data`.
        key: the columns by whose content a row is held out: equal ones stay on one side.
        test_name: of the part that is the test set, where `data` has several.

    Raises:
        DataError: naming the file, and the row where one is at fault.
    """
    parts = _read(data)
    whole = parts.get("train", parts.get("")) or []
    if test is not None:
        others = _read(test)
        held_out = next(iter(others.values()))
        refuse_empty(len(whole), len(held_out), data)
        return Split(whole, held_out, f"{data}, tested on {test}")
    names = [n for n in ((test_name,) if test_name else _TEST_NAMES) if n in parts]
    if names:
        refuse_empty(len(whole), len(parts[names[0]]), data)
        return Split(whole, parts[names[0]], f"{data}, its part {names[0]!r} for testing")
    return split_rows(whole, data, fraction=test_fraction, key=key)


def split_rows(rows: Sequence[Row], source: str, *, fraction: float, key: Sequence[str]) -> Split:
    """Hold out a fraction of the rows, each by a hash of its own content in the columns `key`.

    Raises:
        DataError: a row has no such column, or one side would be empty.
    """
    require_columns(rows, key, source)
    out = [is_held_out(_content(row, key), fraction) for row in rows]
    train = [row for row, held in zip(rows, out, strict=True) if not held]
    rest = [row for row, held in zip(rows, out, strict=True) if held]
    refuse_empty(len(train), len(rest), source)
    return Split(train, rest, source)


def movie_reviews() -> Split:
    """Return the movie-review snippets of `dptorch.training.reviews`, in their fixed split.

    Raises:
        DataError: the package cannot be had, or holds no such file.
    """
    texts, labels = snippets("movie")
    rows = [{"text": t, "label": CLASSES[y]} for t, y in zip(texts, labels.tolist(), strict=True)]
    train, test = ([rows[i] for i in side.tolist()] for side in review_split(len(rows)))
    return Split(train, test, "movie-review snippets from the package vaderSentiment")


def read_rows(source: str) -> Sequence[Row]:
    """Read all rows of a file; of several parts, the test part.

    Raises:
        DataError: naming the file, and the row where one is at fault.
    """
    parts = _read(source)
    names = [name for name in _TEST_NAMES if name in parts]
    return parts[names[0]] if names else next(iter(parts.values()))


def require_columns(rows: Sequence[Row], columns: Sequence[str], source: str) -> None:
    """Raise a `DataError` unless every row has a value in each of `columns`."""
    for number, row in enumerate(rows):
        for column in columns:
            if column not in row:
                raise DataError(
                    f"{source}: row {number} has no column {column!r}. Found {', '.join(row)}."
                )
            value = row[column]
            if value is None or (isinstance(value, str) and not value.strip()):
                raise DataError(
                    f"{source}: row {number} is empty in column {column!r}. Leave such rows out, or "
                    "fill them."
                )


def _content(row: Row, key: Sequence[str]) -> bytes:
    return json.dumps([str(row[column]) for column in key]).encode()


def _read(source: str) -> dict[str, list[Row]]:
    """Rows by part; files have the one part ""."""
    if source.startswith(HUB):
        return _from_hub(source.removeprefix(HUB))
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"{source} does not exist (looked from {Path.cwd()}). A data set of the hub is written "
            f"{HUB}NAME or {HUB}NAME:CONFIG."
        )
    try:
        if path.is_dir():
            return _from_directory(path)
        return {"": _from_file(path)}
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{source}: cannot be read ({error}).") from error


def _from_file(path: Path) -> list[Row]:
    name = path.name.lower()
    if name.endswith((".csv", ".csv.gz", ".tsv")):
        with _opened(path) as file:
            found: list[Row] = []
            for number, row in enumerate(
                csv.DictReader(file, delimiter="\t" if name.endswith(".tsv") else ",")
            ):
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}: row {number} has more or fewer cells than the header. Put quotes "
                        "around texts with commas."
                    )
                found.append(row)
            return found
    if name.endswith(".jsonl"):
        return [_object(line, path, n) for n, line in _lines(path)]
    if name.endswith(".json"):
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path}: expected a list of objects.")
        return rows
    if name.endswith((".parquet", ".pq")):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigurationError(
                f"{path} needs pyarrow ({error}). Install it with: pip install 'dptorch[text]'."
            ) from error
        return pyarrow.parquet.read_table(path).to_pylist()
    raise DataError(
        f"{path}: cannot tell the format. Expected a directory that datasets saved, or one of "
        f"{', '.join(_FORMATS)}."
    )


def _opened(path: Path) -> Any:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _lines(path: Path) -> list[tuple[int, str]]:
    text = path.read_text(encoding="utf-8")
    return [(n, line) for n, line in enumerate(text.splitlines()) if line.strip()]


def _object(line: str, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number + 1} is not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {number + 1} is a {type(row).__name__}, not an object.")
    return row


def _from_directory(path: Path) -> dict[str, list[Row]]:
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        # Files beside each other, named by their part: train.csv, test.csv.
        parts = {p.name.split(".")[0]: _from_file(p) for p in sorted(path.iterdir()) if p.is_file()}
        if "train" not in parts:
            raise DataError(
                f"{path}: neither a directory that datasets saved (save_to_disk) nor one with a file "
                "train.csv, train.jsonl or train.parquet."
            ) from None
        return parts
    return (
        {"": list(found)} if hasattr(found, "features") else {n: list(d) for n, d in found.items()}
    )


def _from_hub(name: str) -> dict[str, list[Row]]:
    datasets = _datasets()
    path, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(path, config or None)
    except Exception as error:
        raise DataError(
            f"{HUB}{name}: cannot be loaded ({error}). Without a network give --data a file or a "
            "directory that datasets saved."
        ) from error
    return {part: list(rows) for part, rows in found.items()}


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            f"Directories and hub names are read by the package datasets, which cannot be imported "
            f"({error}). Install it with: pip install 'dptorch[text]'."
        ) from error
    return datasets
