"""Propose a schema for a table: from the names and the types of its columns, not from what is in it.

Bounds that the name of a column suggests are put in; the others are left for the owner to fill in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from dptorch.errors import one_of
from dptorch.tables.columns import (
    _FALSE,
    _TRUE,
    Category,
    Column,
    Date,
    Drop,
    Number,
    days_since_1970,
    is_empty,
    text_of,
)
from dptorch.tables.faults import Faults
from dptorch.tables.files import Chunk, Table, open_table
from dptorch.tables.schema import FILL_IN, VERSION, FileFormat, Schema, column_to_dict

__all__ = ["proposal_text", "propose", "read_off"]

#: Cells of a text file that are looked at to tell numbers from words. Types are structure, but a text
#: file does not state them.
_LOOKED_AT: Final = 200
#: Most values of a column that are taken for a category, where they may be read.
_MOST_VALUES: Final = 30
_DATE_FORMATS: Final = (None, "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%Y/%m/%d", "%Y%m%d")

#: Words in the name of a column -> bounds that anyone would give.
_BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "age": (0, 120),
    "year": (1900, 2100),
    "month": (1, 12),
    "day": (1, 31),
    "weekday": (0, 7),
    "hour": (0, 24),
    "minute": (0, 60),
    "bmi": (10, 70),
    "weight": (0, 250),
    "height": (0, 250),
    "temperature": (30, 45),
    "systolic": (50, 260),
    "diastolic": (30, 160),
    "pulse": (20, 250),
    "heartrate": (20, 250),
    "latitude": (-90, 90),
    "longitude": (-180, 180),
    "percent": (0, 100),
    "share": (0, 1),
    "probability": (0, 1),
    "rating": (0, 10),
}
_VALUES: Final[Mapping[str, tuple[str, ...]]] = {
    "sex": ("f", "m"),
    "gender": ("female", "male"),
    "weekday": ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"),
}
_NAMES_PEOPLE: Final = frozenset(
    {"id", "ids", "uuid", "guid", "name", "surname", "firstname", "lastname", "email", "phone"}
    | {"address", "street", "ssn", "mrn", "iban", "index"}
)
_WRITTEN: Final = frozenset({"note", "notes", "text", "comment", "comments", "remark", "remarks"})


def propose(
    path: str | Path,
    label: str | None,
    *,
    unit: str | None = None,
    file: FileFormat | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """A schema to be filled in.

    Args:
        path: of the table.
        label: the column to predict; None leaves it to be filled in.
        unit: the column that says whose a row is.
        file: how a text file is written.

    Returns:
        Plain values as `Schema.from_dict` takes them, with "FILL IN ..." where the owner has to say
        something, and what was looked at besides names, in words.

    Raises:
        DataError: the file cannot be read.
        ConfigurationError: there is no such column.
    """
    table = open_table(Path(path), file)
    for name in (label, unit):
        if name is not None:
            one_of("column", name, table.names)
    kinds, looked = _kinds(table)
    columns: dict[str, Any] = {}
    for name in table.names:
        if name == label:
            continue
        columns[name] = {"kind": "drop"} if name == unit else _column(name, kinds[name])
    described: dict[str, Any] = {"column": label or f"{FILL_IN}: a column, described here alone"}
    number = label is None or kinds[label][0] == "number"
    instead = "; of a number bounds [low, high] in their place" if number else ""
    described["classes"] = f"{FILL_IN}: the list of classes{instead}"
    found: dict[str, Any] = {"dptorch_schema": VERSION, "label": described}
    if unit is not None:
        found["unit"] = {"column": unit, "max_rows": 1}
    found["columns"] = columns
    written = file or FileFormat()
    if written != FileFormat():
        values = {"separator": written.separator, "encoding": written.encoding}
        found["file"] = {k: v for k, v in values.items() if v is not None}
        if written.decimal != ".":
            found["file"]["decimal"] = written.decimal
    if looked:
        found["read_from_data"] = looked
    return found, looked


def proposal_text(values: Mapping[str, Any]) -> str:
    """The text of a proposed schema: a column a line."""
    import json

    def line(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    lines = []
    for key, value in values.items():
        if key == "columns":
            inner = ",\n".join(f"    {line(name)}: {line(c)}" for name, c in value.items())
            lines.append(f'  "columns": {{\n{inner}\n  }}')
        else:
            lines.append(f"  {line(key)}: {line(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _words(name: str) -> set[str]:
    """The words of a column's name, in lower case.

    Example:
        >>> sorted(_words("BodyWeight_kg")), sorted(_words("patient-ID"))
        (['body', 'kg', 'weight'], ['id', 'patient'])
    """
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return {word.lower() for word in re.findall(r"[A-Za-z]+", apart)}


def _column(name: str, kind: tuple[str, str | None]) -> dict[str, Any]:
    words = _words(name)
    what, date_format = kind
    if words & _NAMES_PEOPLE:
        return {"kind": "drop"}
    if what == "number":
        bounds = next((list(_BOUNDS[w]) for w in _BOUNDS if w in words), None)
        return {
            "kind": "number",
            "bounds": bounds or f"{FILL_IN}: [lowest, highest], from what the column means",
            "missing": True,
        }
    if what == "date":
        found = {"kind": "date", "bounds": f"{FILL_IN}: [first day, last day]", "missing": True}
        return found if date_format is None else {**found, "format": date_format}
    if what == "boolean":
        return {"kind": "boolean", "missing": True}
    if words & _WRITTEN:
        return {"kind": "drop"}
    values = next((list(_VALUES[w]) for w in _VALUES if w in words), None)
    return {
        "kind": "category",
        "values": values or f"{FILL_IN}: the values that are told apart, or drop the column",
        "other": True,
        "missing": True,
    }


def _kinds(table: Table) -> tuple[dict[str, tuple[str, str | None]], list[str]]:
    """(kind, date format) of each column, and what was looked at."""
    if table.types:
        return {name: (kind, None) for name, kind in table.types.items()}, []
    cells: dict[str, list[Any]] = {name: [] for name in table.names}
    chunk = next(table.chunks(Faults(table.source)), None)
    for name in table.names if chunk is not None else ():
        assert chunk is not None
        cells[name] = [c for c in chunk.columns[name][:_LOOKED_AT] if not is_empty(c)]
    looked = f"which columns hold numbers, dates or words, in the first {_LOOKED_AT} rows"
    return {name: _kind(found) for name, found in cells.items()}, [looked]


def _kind(cells: list[Any]) -> tuple[str, str | None]:
    if not cells:
        return "text", None
    words = {str(cell).strip().lower() for cell in cells}
    if words <= {*_TRUE, *_FALSE} and not words <= {"0", "1"}:
        return "boolean", None
    if all(re.fullmatch(r"\s*[-+]?(\d+[.,]?\d*|[.,]\d+)([eE][-+]?\d+)?\s*", str(c)) for c in cells):
        return "number", None
    for pattern in _DATE_FORMATS:
        if all(days_since_1970(cell, pattern) is not None for cell in cells):
            return "date", pattern
    return "text", None


# -- off the data ----------------------------------------------------------------------------------


def read_off(values: Mapping[str, Any], path: str | Path) -> Schema:
    """Fill in what a proposal leaves open by looking at the private data.

    What is read off is listed in the schema, and statements name it: ε does not cover it.

    Args:
        values: of `propose`.
        path: of the table.

    Returns:
        A complete schema. Columns of text with more than 30 values are dropped.

    Raises:
        DataError: the file cannot be read.
    """
    open_values = {
        name: column
        for name, column in values["columns"].items()
        if any(_is_open(value) for value in column.values())
    }
    label = values["label"]["column"]
    file = FileFormat(**values.get("file", {}))
    table = open_table(Path(path), file)
    faults = Faults(table.source, table.place)
    wanted = [*open_values, label]
    seen: dict[str, Counter[Any]] = {name: Counter() for name in wanted}
    for chunk in table.chunks(faults):
        _count(chunk, wanted, seen)
    noted = list(values.get("read_from_data", []))
    columns = {}
    for name, described in values["columns"].items():
        if name not in open_values:
            columns[name] = described
            continue
        column = _fit(described, seen[name], file.decimal)
        columns[name] = column_to_dict(column)
        if not isinstance(column, Drop):
            noted.append(f"{'values' if isinstance(column, Category) else 'bounds'} of {name}")
    said = {"column": label, **_targets(seen[label], file.decimal)}
    noted.append(f"{'classes' if 'classes' in said else 'bounds'} of {label}")
    return Schema.from_dict({**values, "label": said, "columns": columns, "read_from_data": noted})


def _targets(seen: Counter[Any], decimal: str) -> dict[str, Any]:
    """The classes of a label, or the bounds of one that is a number: one with many values."""
    if len(seen) > _MOST_VALUES:
        try:
            numbers = [float(str(text).replace(decimal, ".")) for text in seen]
            return {"bounds": [min(numbers), max(numbers)]}
        except ValueError:
            pass
    return {"classes": sorted(seen)}


def _is_open(value: object) -> bool:
    return isinstance(value, str) and value.startswith(FILL_IN)


def _count(chunk: Chunk, wanted: Iterable[str], seen: Mapping[str, Counter[Any]]) -> None:
    for name in wanted:
        seen[name].update(text_of(c) for c in chunk.columns[name] if not is_empty(c))


def _fit(described: Mapping[str, Any], seen: Counter[Any], decimal: str) -> Column:
    kind = described["kind"]
    if kind == "number":
        numbers = sorted(float(str(text).replace(decimal, ".")) for text in seen)
        if not numbers or numbers[0] == numbers[-1]:
            return Drop()
        return Number((numbers[0], numbers[-1]), missing=True)
    if kind == "date":
        pattern = described.get("format")
        days = sorted(d for d in (days_since_1970(t, pattern) for t in seen) if d is not None)
        if not days or int(days[0]) == int(days[-1]):
            return Drop()
        return Date((_day(days[0]), _day(days[-1])), pattern, missing=True)
    if not 2 <= len(seen) <= _MOST_VALUES:
        return Drop()
    return Category(tuple(sorted(seen)), other=True, missing=True)


def _day(days: float) -> Any:
    import datetime

    return datetime.date(1970, 1, 1) + datetime.timedelta(days=int(days))
