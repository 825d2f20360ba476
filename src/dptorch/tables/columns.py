"""Kinds of columns: what is public about each, and how its cells become numbers.

A cell is what a file or a row in memory holds: a text, a number, a date, or nothing. Each kind turns
the cells of one column into float64 numbers, [N, width]: NaN where a cell is empty, and a fault for
each cell that does not fit. What becomes of these numbers is in `preprocessing`.
"""

from __future__ import annotations

import datetime
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "EMPTY",
    "KINDS",
    "Boolean",
    "Category",
    "Cells",
    "Column",
    "Date",
    "Drop",
    "Number",
    "Text",
    "is_empty",
    "lookup",
    "text_of",
]

Cells: TypeAlias = Sequence[Any] | NDArray[Any]
Report = Callable[[int, str], None]
Numbers = NDArray[np.float64]

#: What counts as an empty cell of a text file, besides blanks.
EMPTY: Final = frozenset(
    {"", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "<NA>", "#N/A", "NaT"}
)
_TRUE: Final = ("true", "yes", "y", "t", "1")
_FALSE: Final = ("false", "no", "n", "f", "0")
_EPOCH: Final = datetime.datetime(1970, 1, 1)
_DAY: Final = 86400.0


class Column(Protocol):
    """A kind of column."""

    @property
    def width(self) -> int:
        """How many numbers a cell becomes."""

    def read(self, cells: Cells, report: Report) -> Numbers:
        """Read cells [N] into float64 [N, width]; `report(i, what)` for each that does not fit."""


@dataclass(frozen=True)
class Number:
    """A number.

    Attributes:
        bounds: values are clipped to these and scaled to [-1, 1]; None leaves them as they are.
        missing: whether a cell may be empty. It then counts as `fill`, and an indicator says so.
        fill: value of an empty cell; None is the middle of the bounds.
        log: scale the logarithm instead, for what spans orders of magnitude. Bounds are positive.
        decimal: "," where a comma stands before the decimals.
    """

    bounds: tuple[float, float] | None = None
    missing: bool = False
    fill: float | None = None
    log: bool = False
    decimal: str = "."
    width: ClassVar[int] = 1

    def read(self, cells: Cells, report: Report) -> Numbers:
        """See `Column`."""
        if isinstance(cells, np.ndarray) and cells.dtype.kind in "biuf":
            found = cells.astype(np.float64)
            bad = np.isinf(found) if self.missing else ~np.isfinite(found)
            for i in np.flatnonzero(bad):
                report(int(i), f"{cells[i]!s} is not a finite number")
            return np.where(np.isinf(found), 0.0, found)[:, None]
        try:
            found = np.fromiter(map(float, cells), np.float64, len(cells))
            if np.isfinite(found).all() and self.decimal == ".":
                return found[:, None]
        except (TypeError, ValueError):
            pass
        return self._read_one_by_one(cells, report)

    def _read_one_by_one(self, cells: Cells, report: Report) -> Numbers:
        found = np.full(len(cells), np.nan)
        for i, cell in enumerate(cells):
            if is_empty(cell):
                if not self.missing:
                    report(i, _gap(cell))
                continue
            try:
                text = str(cell)
                if self.decimal != ".":
                    text = text.replace(self.decimal, ".")
                value = float(text)
            except ValueError:
                value = math.nan
            if math.isfinite(value):
                found[i] = value
            else:
                report(i, f"{_shown(cell)} is not a finite number")
        return found[:, None]


@dataclass(frozen=True)
class Category:
    """One of a public list of values.

    Attributes:
        values: all that are told apart. Case counts, blanks around a value do not.
        other: whether a value that is not listed counts as one more, "other". Otherwise it is a fault.
        missing: whether a cell may be empty; that is one more value.
    """

    values: tuple[str, ...]
    other: bool = True
    missing: bool = False
    width: ClassVar[int] = 1

    def read(self, cells: Cells, report: Report) -> Numbers:
        """See `Column`: the place in `values`, their number for "other"."""
        other = len(self.values) if self.other else None
        return lookup(cells, self.values, report, other=other, missing=self.missing)[:, None]


@dataclass(frozen=True)
class Boolean:
    """Yes or no.

    Attributes:
        true, false: the words for each, in lower case.
        missing: whether a cell may be empty; an indicator says so.
    """

    true: tuple[str, ...] = _TRUE
    false: tuple[str, ...] = _FALSE
    missing: bool = False
    width: ClassVar[int] = 1

    def read(self, cells: Cells, report: Report) -> Numbers:
        """See `Column`: 1, 0 or NaN."""
        value = {word: 1.0 for word in self.true} | {word: 0.0 for word in self.false}
        found = np.full(len(cells), np.nan)
        for i, cell in enumerate(cells):
            if is_empty(cell):
                if not self.missing:
                    report(i, _gap(cell))
                continue
            word = text_of(cell).lower()
            if word in value:
                found[i] = value[word]
            else:
                report(i, f"{_shown(cell)} is neither yes nor no: {self.true[0]}, {self.false[0]}")
        return found[:, None]


@dataclass(frozen=True)
class Date:
    """A date, or a date and a time of day.

    Attributes:
        bounds: first and last day; dates outside count as these. Scaled to [-1, 1].
        format: as `datetime.strptime` takes it; None is ISO 8601, such as 2026-02-28.
        missing: whether a cell may be empty. It then counts as the middle, and an indicator says so.
    """

    bounds: tuple[datetime.date, datetime.date]
    format: str | None = None
    missing: bool = False
    width: ClassVar[int] = 1

    def read(self, cells: Cells, report: Report) -> Numbers:
        """See `Column`: days since 1970."""
        known: dict[Any, float | None] = {}
        found = np.full(len(cells), np.nan)
        for i, cell in enumerate(cells):
            if is_empty(cell):
                if not self.missing:
                    report(i, _gap(cell))
                continue
            if cell not in known:
                known[cell] = days_since_1970(cell, self.format)
            days = known[cell]
            if days is None:
                expected = self.format or "2026-02-28"
                report(i, f"{_shown(cell)} is not a date such as {expected}")
            else:
                found[i] = days
        return found[:, None]


@dataclass(frozen=True)
class Text:
    """Free text as counts of hashed words. The hash is fixed, so that it says nothing of the data.

    Attributes:
        buckets: how many numbers the counts are summed into.
    """

    buckets: int = 64

    @property
    def width(self) -> int:
        """One number for each bucket."""
        return self.buckets

    def read(self, cells: Cells, report: Report) -> Numbers:
        """See `Column`. An empty text has no words."""
        found = np.zeros((len(cells), self.buckets))
        for i, cell in enumerate(cells):
            if not is_empty(cell):
                for word in re.findall(r"\w+", str(cell).lower()):
                    found[i, zlib.crc32(word.encode()) % self.buckets] += 1
        return found


@dataclass(frozen=True)
class Drop:
    """A column that is not used."""

    width: ClassVar[int] = 0

    def read(self, cells: Cells, report: Report) -> Numbers:
        """See `Column`: nothing is read."""
        return np.empty((len(cells), 0))


def is_empty(cell: Any) -> bool:
    """Whether a cell holds nothing.

    Example:
        >>> [is_empty(cell) for cell in (None, " ", "NA", float("nan"), 0, "0")]
        [True, True, True, True, False, False]
    """
    if isinstance(cell, str):
        return cell.strip() in EMPTY
    if cell is None:
        return True
    try:
        return bool(cell != cell)
    except (TypeError, ValueError):  # pandas.NA is neither equal nor unequal to anything
        return True


def text_of(cell: Any) -> str:
    """The text by which a cell is compared with a list of values: 1.0 and "1.0" are "1".

    Example:
        >>> [text_of(cell) for cell in (1, 1.0, " a ", True)]
        ['1', '1', 'a', 'True']
    """
    if isinstance(cell, str):
        return cell.strip()
    if isinstance(cell, float | np.floating) and float(cell).is_integer():
        return str(int(cell))
    return str(cell)


def lookup(
    cells: Cells,
    values: Sequence[str],
    report: Report,
    *,
    other: int | None = None,
    missing: bool = False,
) -> Numbers:
    """The place of each cell in `values`, as float64 [N]; NaN where it is empty.

    Args:
        other: of a cell that is not in `values`; None reports it.
        missing: whether cells may be empty.
    """
    place: dict[Any, float] = {value: float(i) for i, value in enumerate(values)}
    found = np.full(len(cells), np.nan)
    for i, cell in enumerate(cells):
        if cell.__class__ is str and cell in place:  # "NA" is a value where it is listed as one
            found[i] = place[cell]
            continue
        if is_empty(cell):
            if not missing:
                report(i, _gap(cell))
            continue
        text = text_of(cell)
        at = place.get(text, place.get(_whole(text)))
        if at is not None:
            found[i] = at
        elif other is not None:
            found[i] = other
        else:
            known = ", ".join(values[:6]) + (", ..." if len(values) > 6 else "")
            report(i, f"{_shown(cell)} is not one of {known}")
    return found


def days_since_1970(cell: Any, format: str | None = None) -> float | None:
    """A date as a number of days, None if the cell is none.

    Example:
        >>> days_since_1970("1970-01-03"), days_since_1970("3.1.1970", "%d.%m.%Y")
        (2.0, 2.0)
        >>> days_since_1970("tomorrow") is None
        True
    """
    if isinstance(cell, np.datetime64):
        cell = cell.astype("datetime64[s]").item()
    if isinstance(cell, datetime.date) and not isinstance(cell, datetime.datetime):
        cell = datetime.datetime(cell.year, cell.month, cell.day)
    if not isinstance(cell, datetime.datetime):
        text = str(cell).strip()
        try:
            if format is None:
                # Python 3.10 does not read the Z.
                cell = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
            else:
                cell = datetime.datetime.strptime(text, format)
        except ValueError:
            return None
    if cell.tzinfo is not None:
        cell = cell.astimezone(datetime.timezone.utc).replace(tzinfo=None)
    return float((cell - _EPOCH).total_seconds()) / _DAY


KINDS: Final[Mapping[str, type[Any]]] = {
    "number": Number,
    "category": Category,
    "boolean": Boolean,
    "date": Date,
    "text": Text,
    "drop": Drop,
}


def _whole(text: str) -> str:
    """The integer that a text like "1.0" stands for, or the text."""
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def _gap(cell: Any) -> str:
    return ("" if cell is None else f"{_shown(cell)}, ") + 'an empty cell, and not "missing": true'


def _shown(cell: Any) -> str:
    text = repr(cell)
    return text if len(text) <= 40 else text[:36] + "...'"
