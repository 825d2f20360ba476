"""A schema: all that is public about a table, as a JSON file.

    {
      "dptorch_schema": 1,
      "label": {"column": "diagnosis", "classes": ["flu", "cold", "none"], "weights": {"flu": 2}},
      "unit": {"column": "patient_id", "max_rows": 1},
      "columns": {
        "age": {"kind": "number", "bounds": [0, 120], "missing": true, "fill": 45},
        "sex": {"kind": "category", "values": ["f", "m"], "other": true, "missing": true},
        "smoker": {"kind": "boolean"},
        "admitted": {"kind": "date", "bounds": ["2015-01-01", "2026-12-31"]},
        "notes": {"kind": "text", "buckets": 64},
        "name": {"kind": "drop"}
      },
      "file": {"separator": ";", "encoding": "latin-1", "decimal": ","}
    }

Bounds and lists say what a column *can* hold, which its meaning tells. What is read off the data
instead is listed under ``read_from_data``, and the statement names it among the assumptions.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from dptorch.errors import ConfigurationError
from dptorch.tables.columns import KINDS, Category, Column, Date, Drop, Number, Text
from dptorch.tables.faults import SHOWN

__all__ = ["FILL_IN", "FileFormat", "Label", "Schema", "Unit"]

VERSION: Final = 1
#: What stands in a proposed schema where its owner has to say something.
FILL_IN: Final = "FILL IN"


@dataclass(frozen=True)
class Label:
    """The column to predict.

    Attributes:
        column: its name.
        classes: the classes in order; None if they are still to be read off the data.
        bounds: for a number: targets are clipped to these. None for classes.
        weights: factors of the loss by class, public; 1 for those that are not named.
    """

    column: str
    classes: tuple[str, ...] | None = None
    bounds: tuple[float, float] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_number(self) -> bool:
        """Whether a number is predicted (regression), not a class."""
        return self.bounds is not None


@dataclass(frozen=True)
class Unit:
    """Whom the guarantee protects: all rows with one value of a column.

    Attributes:
        column: its name.
        max_rows: how many rows of one unit enter a step at most; more than that are drawn from.
    """

    column: str
    max_rows: int = 1


@dataclass(frozen=True)
class FileFormat:
    """How a text file is written.

    Attributes:
        separator: between fields; None takes what the header line has most of: comma, semicolon, tab
            or bar.
        encoding: a name that Python knows; None is UTF-8, or what a byte order mark says.
        decimal: "." or ",".
    """

    separator: str | None = None
    encoding: str | None = None
    decimal: str = "."


@dataclass(frozen=True)
class Schema:
    """All that is public about a table.

    Attributes:
        label: what to predict.
        columns: every other column by name. `unit.column` may be among them or not.
        unit: whom the guarantee protects; None is one row.
        file: how a text file is written.
        read_from_data: what of this was read off the private data, in words.

    Example:
        >>> schema = Schema(Label("sick", ("no", "yes")), {"age": Number((0.0, 120.0))})
        >>> Schema.from_dict(schema.to_dict()) == schema
        True
    """

    label: Label
    columns: Mapping[str, Column]
    unit: Unit | None = None
    file: FileFormat = field(default_factory=FileFormat)
    read_from_data: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them."""
        label: dict[str, Any] = {"column": self.label.column}
        if self.label.bounds is not None:
            label["bounds"] = list(self.label.bounds)
        else:
            label["classes"] = None if self.label.classes is None else list(self.label.classes)
        if self.label.weights:
            label["weights"] = dict(self.label.weights)
        found: dict[str, Any] = {"dptorch_schema": VERSION, "label": label}
        if self.unit is not None:
            found["unit"] = {"column": self.unit.column, "max_rows": self.unit.max_rows}
        found["columns"] = {name: column_to_dict(column) for name, column in self.columns.items()}
        written = {f.name: getattr(self.file, f.name) for f in fields(FileFormat)}
        if self.file != FileFormat():
            found["file"] = {name: value for name, value in written.items() if value is not None}
        if self.read_from_data:
            found["read_from_data"] = list(self.read_from_data)
        return found

    def to_json(self) -> str:
        """The text of a schema file: a column a line."""
        lines = []
        values = self.to_dict()
        for key, value in values.items():
            if key == "columns":
                inner = [f"    {_json(name)}: {_json(column)}" for name, column in value.items()]
                lines.append('  "columns": {\n' + ",\n".join(inner) + "\n  }")
            else:
                lines.append(f"  {_json(key)}: {_json(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_dict(cls, values: object, source: str = "schema") -> Schema:
        """The schema that plain values describe.

        Raises:
            ConfigurationError: naming everything that is wrong, each by its place.
        """
        return _Reader(source).schema(values)

    @classmethod
    def read(cls, path: str | Path) -> Schema:
        """The schema in a JSON file.

        Raises:
            ConfigurationError: the file cannot be read, or `from_dict` refuses what it says.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError(
                f"schema={str(path)!r} cannot be read ({error.strerror}). Make one with: dptorch "
                "schema TABLE --label COLUMN"
            ) from None
        except ValueError as error:
            raise ConfigurationError(f"{path}: not JSON ({error}).") from None
        return cls.from_dict(values, str(path))


def column_to_dict(column: Column) -> dict[str, Any]:
    """Plain values of a column: its kind, and what differs from the kind's defaults."""
    kind = next(name for name, cls in KINDS.items() if type(column) is cls)
    found: dict[str, Any] = {"kind": kind}
    for f in fields(column):  # type: ignore[arg-type]
        value = getattr(column, f.name)
        if f.name == "decimal" or (value == f.default and f.name not in ("other", "missing")):
            continue
        found[f.name] = list(map(_plain, value)) if isinstance(value, tuple) else value
    return found


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime.date) else value


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


class _Reader:
    """Reads a schema and notes everything that is wrong with it."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._wrong: list[str] = []

    def schema(self, values: object) -> Schema:
        top = self._table(values, "the schema", {"dptorch_schema", "label", "unit", "columns",
                                                  "file", "read_from_data"})  # fmt: skip
        version = top.get("dptorch_schema", VERSION)
        if version != VERSION:
            self._note("dptorch_schema", f"{version!r}; this version reads {VERSION}")
        file = self._file(top.get("file", {}))
        label = self._label(top.get("label"))
        columns = {}
        for name, described in self._table(top.get("columns"), "columns", None).items():
            columns[name] = self._column(described, f"columns.{name}", file.decimal)
        if label.column in columns:
            self._note(f"columns.{label.column}", "is the label too; describe it once")
        if columns and all(isinstance(column, Drop) for column in columns.values()):
            self._note("columns", "all are dropped; nothing is left to predict from")
        unit = self._unit(top.get("unit"))
        noted = top.get("read_from_data", [])
        if not (isinstance(noted, list) and all(isinstance(item, str) for item in noted)):
            self._note("read_from_data", "is not a list of texts")
            noted = []
        if self._wrong:
            more = len(self._wrong) - SHOWN
            listed = self._wrong[:SHOWN] + ([f"... and {more} more"] if more > 0 else [])
            if len(listed) == 1:
                raise ConfigurationError(f"{self._source}: {listed[0]}.")
            raise ConfigurationError("\n  ".join([f"{self._source}:", *listed]))
        return Schema(label, columns, unit, file, tuple(noted))

    def _note(self, where: str, what: str) -> None:
        self._wrong.append(f"{where}: {what}")

    def _table(self, value: object, where: str, known: set[str] | None) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._note(where, "is missing" if value is None else f"{value!r} is not an object")
            return {}
        for key in value if known is not None else ():
            if key not in (known or ()):
                self._note(where, f"{key!r} is not known. Known: {', '.join(sorted(known or ()))}")
        return value

    def _name(self, value: object, where: str) -> str:
        if isinstance(value, str) and value.startswith(FILL_IN):
            self._note(where, "is still to be filled in")
        elif not isinstance(value, str) or not value:
            self._note(where, f"{value!r} is not the name of a column")
        return str(value)

    def _names(self, value: object, where: str, least: int) -> tuple[str, ...]:
        if isinstance(value, str) and value.startswith(FILL_IN):
            self._note(where, "is still to be filled in")
            return ()
        if not isinstance(value, list) or not all(isinstance(v, str | int) for v in value):
            self._note(where, f"{value!r} is not a list of names")
            return ()
        names = tuple(str(v).strip() for v in value)
        if len(set(names)) < len(names) or len(names) < least or "" in names:
            self._note(where, f"expected at least {least} different names, found {list(names)}")
        return names

    def _bounds(self, value: object, where: str, meaning: str) -> tuple[float, float]:
        if isinstance(value, str) and value.startswith(FILL_IN):
            self._note(where, "are still to be filled in")
            return (0.0, 1.0)
        ok = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
        if not (isinstance(value, list) and ok and value[0] < value[1]):
            self._note(where, f"{value!r} is not a pair [low, high] of finite numbers, {meaning}")
            return (0.0, 1.0)
        return (float(value[0]), float(value[1]))

    def _label(self, value: object) -> Label:
        known = {"column", "classes", "bounds", "weights"}
        said = self._table(value, "label", known)
        column = self._name(said.get("column"), "label.column")
        weights = said.get("weights", {})
        if "bounds" in said:
            if "classes" in said or weights:
                self._note("label", "bounds (a number) exclude classes and weights")
            return Label(column, bounds=self._bounds(said["bounds"], "label.bounds", "low < high"))
        classes = None
        if said.get("classes") is not None:
            classes = self._names(said["classes"], "label.classes", 2)
        for name, weight in self._table(weights, "label.weights", None).items():
            if classes is not None and name not in classes:
                self._note("label.weights", f"{name!r} is not a class")
            if not (_is_number(weight) and weight > 0):
                self._note("label.weights", f"{name}: {weight!r} is not a positive number")
        return Label(column, classes, weights=dict(weights) if isinstance(weights, dict) else {})

    def _unit(self, value: object) -> Unit | None:
        if value is None:
            return None
        said = self._table(value, "unit", {"column", "max_rows"})
        most = said.get("max_rows", 1)
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            self._note("unit.max_rows", f"{most!r} is not a positive integer")
            most = 1
        return Unit(self._name(said.get("column"), "unit.column"), most)

    def _file(self, value: object) -> FileFormat:
        said = self._table(value, "file", {f.name for f in fields(FileFormat)})
        separator, encoding = said.get("separator"), said.get("encoding")
        decimal = said.get("decimal", ".")
        if separator is not None and not (isinstance(separator, str) and len(separator) == 1):
            self._note("file.separator", f"{separator!r} is not one character")
            separator = None
        if encoding is not None:
            try:
                "".encode(encoding)
            except (LookupError, TypeError):
                self._note("file.encoding", f"{encoding!r} is not an encoding that Python knows")
                encoding = None
        if decimal not in (".", ","):
            self._note("file.decimal", f"{decimal!r} is neither '.' nor ','")
            decimal = "."
        return FileFormat(separator, encoding, decimal)

    def _column(self, value: object, where: str, decimal: str) -> Column:
        kind = value.get("kind") if isinstance(value, dict) else None
        cls = KINDS.get(kind) if isinstance(kind, str) else None
        if cls is None:
            self._note(where, f"kind {kind!r} is not one of {', '.join(KINDS)}")
            return Drop()
        known = {"kind"} | {f.name for f in fields(cls)} - {"decimal"}
        said = self._table(value, where, known)
        for flag in ("missing", "other", "log"):
            if flag in said and not isinstance(said[flag], bool):
                self._note(f"{where}.{flag}", f"{said[flag]!r} is neither true nor false")
        missing = said.get("missing") is True
        if cls is Number:
            return self._number(said, where, missing, decimal)
        if cls is Category:
            names = self._names(said.get("values"), f"{where}.values", 1)
            return Category(names, said.get("other", True) is True, missing)
        if cls is Date:
            return self._date(said, where, missing)
        if cls is Text:
            buckets = said.get("buckets", Text.buckets)
            if isinstance(buckets, bool) or not isinstance(buckets, int) or buckets < 1:
                self._note(f"{where}.buckets", f"{buckets!r} is not a positive integer")
                buckets = Text.buckets
            return Text(buckets)
        if cls is Drop:
            return Drop()
        words = {}
        for side in ("true", "false"):
            if side in said:
                words[side] = tuple(
                    w.lower() for w in self._names(said[side], f"{where}.{side}", 1)
                )
        column = replace(cls(**words), missing=missing)
        if set(column.true) & set(column.false):
            self._note(where, f"{min(set(column.true) & set(column.false))!r} is true and false")
        return column

    def _number(self, said: Mapping[str, Any], where: str, missing: bool, decimal: str) -> Number:
        bounds = None
        if said.get("bounds") is not None:
            bounds = self._bounds(said["bounds"], f"{where}.bounds", "low < high")
        log, fill = said.get("log", False) is True, said.get("fill")
        if log and (bounds is None or bounds[0] <= 0):
            self._note(f"{where}.log", f"needs positive bounds, not {said.get('bounds')!r}")
            bounds = (1.0, 2.0)
        if fill is not None and not _is_number(fill):
            self._note(f"{where}.fill", f"{fill!r} is not a finite number")
            fill = None
        if missing and bounds is None and fill is None:
            self._note(where, "cells may be missing, so it needs bounds or a fill")
            fill = 0.0
        return Number(bounds, missing, None if fill is None else float(fill), log, decimal)

    def _date(self, said: Mapping[str, Any], where: str, missing: bool) -> Date:
        bounds = said.get("bounds")
        first, last = datetime.date(1970, 1, 1), datetime.date(2100, 1, 1)
        if isinstance(bounds, str) and bounds.startswith(FILL_IN):
            self._note(f"{where}.bounds", "are still to be filled in")
        else:
            try:
                first, last = (datetime.date.fromisoformat(day) for day in bounds)  # type: ignore[union-attr]
                if not first < last:
                    raise ValueError
            except (TypeError, ValueError):
                self._note(f"{where}.bounds", f"{bounds!r} is not a pair of dates [first, last]")
        pattern = said.get("format")
        if pattern is not None and not isinstance(pattern, str):
            self._note(f"{where}.format", f"{pattern!r} is not a text such as %d.%m.%Y")
            pattern = None
        return Date((first, last), pattern, missing)


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
