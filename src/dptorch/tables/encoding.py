"""Turn the cells of a table into numbers, as its schema says, and name every cell that does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dptorch.errors import DataError
from dptorch.tables.columns import Drop, Number, is_empty, lookup, text_of
from dptorch.tables.faults import Faults
from dptorch.tables.files import Chunk
from dptorch.tables.schema import Schema

__all__ = ["Encoded", "encode", "missing_columns"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """The rows of a table as numbers.

    Attributes:
        raw: float64 [N, D], as `dptorch.tables.Preprocessing` takes them: D is `Preprocessing.width`.
        labels: a class number (int64 [N]) or a target (float64 [N]); None if they were not asked for.
            Texts [N] if the schema leaves the classes open.
        units: the text of each row's unit, [N]; None without one.
        numbers: of each row, as messages name it.
        kept: the cells of further columns that were asked for, as texts.
        skipped: how many rows were left out because of a fault.
    """

    raw: NDArray[np.float64]
    labels: Any
    units: list[str] | None
    numbers: list[int]
    kept: dict[str, list[str]]
    skipped: int

    def __len__(self) -> int:
        return len(self.raw)


def missing_columns(schema: Schema, names: Sequence[str], *, labelled: bool) -> list[str]:
    """The columns that the schema needs and `names` lacks."""
    needed = [name for name, column in schema.columns.items() if not isinstance(column, Drop)]
    if labelled:
        needed.append(schema.label.column)
        if schema.unit is not None:
            needed.append(schema.unit.column)
    return [name for name in needed if name not in names]


def encode(
    schema: Schema,
    chunks: Iterable[Chunk],
    faults: Faults,
    *,
    labelled: bool = True,
    keep: Sequence[str] = (),
    skip: bool = False,
) -> Encoded:
    """Turn the cells of a table into numbers.

    Args:
        schema: says how.
        chunks: the rows.
        faults: is told of each cell that does not fit.
        labelled: whether there is a label and a unit to read.
        keep: further columns whose texts are wanted.
        skip: leave rows with a fault out. Otherwise any fault is an error.

    Guarantees:
        What a row becomes depends on that row and the schema alone: no statistic, no list of values and
        no choice of rows is taken from the data.
        Held by `test_what_a_row_becomes_depends_on_that_row_alone`.

    Raises:
        DataError: listing the first twenty faults, if rows with faults are not skipped; or a column is
            missing.
    """
    raws, labels, units = [], [], []
    numbers: list[int] = []
    kept: dict[str, list[str]] = {name: [] for name in keep}
    checked = False
    for chunk in chunks:
        if not chunk.columns and not len(chunk):
            continue  # no rows in memory have no columns either
        if not checked:
            _refuse_missing(schema, chunk, faults.source, [*keep], labelled)
            checked = True
        raw = _features(schema, chunk, faults)
        label = _labels(schema, chunk, faults) if labelled else None
        unit = _units(schema, chunk, faults) if labelled and schema.unit else None
        good = np.ones(len(chunk), bool)
        if faults.rows:
            good[:] = [number not in faults.rows for number in chunk.numbers]
        raws.append(raw[good])
        numbers += [number for number, fine in zip(chunk.numbers, good, strict=True) if fine]
        if label is not None:
            labels.append(label[good])
        if unit is not None:
            units += [text for text, fine in zip(unit, good, strict=True) if fine]
        for name in keep:
            cells = [text_of(c) for c, g in zip(chunk.columns[name], good, strict=True) if g]
            kept[name] += ["(empty)" if is_empty(text) else text for text in cells]
    if not skip:
        faults.refuse()
    width = sum(column.width for column in schema.columns.values())
    return Encoded(
        np.concatenate(raws) if raws else np.empty((0, width)),
        np.concatenate(labels) if labels else None,
        units if labelled and schema.unit else None,
        numbers,
        kept,
        len(faults.rows),
    )


def _refuse_missing(
    schema: Schema, chunk: Chunk, source: str, keep: list[str], labelled: bool
) -> None:
    names = list(chunk.columns)
    lost = missing_columns(schema, names, labelled=labelled)
    lost += [name for name in keep if name not in names]
    if lost:
        raise DataError(
            f"{source}: no column {', '.join(map(repr, lost))}. Found {', '.join(names) or 'none'}."
        )


def _features(schema: Schema, chunk: Chunk, faults: Faults) -> NDArray[np.float64]:
    parts = [np.empty((len(chunk), 0))]
    for name, column in schema.columns.items():
        if not isinstance(column, Drop):
            report = _reporter(chunk, name, faults)
            parts.append(column.read(chunk.columns[name], report))
    return np.concatenate(parts, axis=1)


def _labels(schema: Schema, chunk: Chunk, faults: Faults) -> NDArray[Any]:
    label = schema.label
    cells = chunk.columns[label.column]
    report = _reporter(chunk, label.column, faults)
    if label.is_number:
        column = Number(label.bounds, decimal=schema.file.decimal)
        return column.read(cells, report)[:, 0]
    if label.classes is not None:
        found = lookup(cells, label.classes, report)
        return np.nan_to_num(found).astype(np.int64)
    texts = np.empty(len(cells), object)
    for i, cell in enumerate(cells):
        if cell is None or str(cell).strip() == "" or cell != cell:
            report(i, "the label is empty")
        texts[i] = text_of(cell)
    return texts


def _units(schema: Schema, chunk: Chunk, faults: Faults) -> list[str]:
    assert schema.unit is not None
    cells = chunk.columns[schema.unit.column]
    report = _reporter(chunk, schema.unit.column, faults)
    for i, cell in enumerate(cells):
        if is_empty(cell):
            report(i, "the unit is empty: every row needs an owner")
    return [text_of(cell) for cell in cells]


def _reporter(chunk: Chunk, column: str, faults: Faults) -> Any:
    return lambda i, what: faults.add(chunk.numbers[i], column, what)
