"""A table as training and test examples: by a schema, or with numbers in every column but the label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dptorch.errors import ConfigurationError, DataError
from dptorch.tables import Encoded, Label, Preprocessing, Schema, Unit, encode, open_table
from dptorch.tables.columns import Column, Number
from dptorch.tables.faults import Faults
from dptorch.tables.files import Table
from dptorch.training.data import (
    Examples,
    ReadOptions,
    TableFacts,
    TrainTest,
    encode_labels,
    is_held_out,
    refuse_empty,
)

__all__ = ["read_table", "scale_target"]


def read_table(path: Path, options: ReadOptions) -> TrainTest:
    """Read a table; see `dptorch.tables`.

    The test set is chosen by a hash: of a row's unit if there is one, so that nobody is on both sides,
    otherwise of its features.

    Guarantees:
        All rows of a unit are on one side, and the side depends on nobody else.
        Held by `test_a_unit_is_on_one_side`.

    Raises:
        DataError: the file cannot be read, or rows do not fit.
        ConfigurationError: the schema is wrong or does not fit the table.
    """
    if options.schema is not None:
        schema = Schema.read(options.schema)
        table = open_table(path, schema.file)
        _refuse_other_columns(schema, table, options.schema)
    else:
        table = open_table(path)
        schema = _numbers_only(table, options)
    if options.unit_column is not None:
        schema = _with_unit(schema, options.unit_column, table)
    groups = [name.strip() for name in (options.subgroups or "").split(",") if name.strip()]
    faults = Faults(str(path), table.place)
    skip = options.on_bad_row == "skip"
    rows = encode(schema, table.chunks(faults), faults, keep=groups, skip=skip)
    if len(rows) == 0:
        raise DataError(
            f"{path}: no rows under the header." if table.place == "line" else f"{path}: no rows."
        )
    labels, schema = _labels(rows, schema, str(path))
    return _split(rows, labels, schema, groups, options.test_fraction, path)


def scale_target(targets: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Clip targets to the bounds and scale them to [-1, 1], as float32."""
    low, high = bounds
    return ((targets.double().clamp(low, high) - low) * (2 / (high - low)) - 1).float()


def _numbers_only(table: Table, options: ReadOptions) -> Schema:
    """The schema of a table without one: every column but the label is a number."""
    if options.label not in table.names:
        raise DataError(
            f"{table.source}: no column {options.label!r}. Found {', '.join(table.names) or 'none'}. "
            "Say which holds the class with --label COLUMN."
        )
    features = [n for n in table.names if n not in (options.label, options.unit_column)]
    if not features:
        raise DataError(
            f"{table.source}: {options.label!r} is the only column. Expected features beside it."
        )
    for name in features:
        if table.types.get(name, "number") not in ("number", "boolean"):
            raise DataError(
                f"{table.source}, column {name!r}: {table.types[name]} is not a number. Describe the "
                "columns in a schema: dptorch schema."
            )
    ranges = options.ranges(features)
    columns: Mapping[str, Column] = {name: Number(ranges[name]) for name in features}
    return Schema(Label(options.label), columns)


def _with_unit(schema: Schema, column: str, table: Table) -> Schema:
    if column not in table.names:
        raise ConfigurationError(
            f"unit_column={column!r} is not in {table.source}. Found {', '.join(table.names)}."
        )
    if schema.unit is not None and schema.unit.column != column:
        raise ConfigurationError(
            f"unit_column={column!r}, but the unit of the schema is {schema.unit.column!r}. Leave one "
            "out."
        )
    return schema if schema.unit is not None else replace(schema, unit=Unit(column))


def _refuse_other_columns(schema: Schema, table: Table, source: str) -> None:
    """A column that the schema does not know may be meant, so it is not left out silently."""
    known = {*schema.columns, schema.label.column, *([schema.unit.column] if schema.unit else [])}
    if unknown := [name for name in table.names if name not in known]:
        raise ConfigurationError(
            f"{source} says nothing of {', '.join(map(repr, unknown))} in {table.source}. Describe "
            'each, or leave it out: {"kind": "drop"}.'
        )


def _labels(rows: Encoded, schema: Schema, source: str) -> tuple[Tensor, Schema]:
    """The labels as numbers, and the schema with its classes."""
    label = schema.label
    if label.bounds is not None:
        return scale_target(torch.from_numpy(rows.labels), label.bounds), schema
    if label.classes is not None:
        return torch.from_numpy(rows.labels), schema
    codes, classes = encode_labels(rows.labels.tolist(), source)
    seen = (*schema.read_from_data, f"classes of {label.column}")
    known = replace(schema, label=replace(label, classes=classes), read_from_data=seen)
    return codes, known


def _split(
    rows: Encoded, labels: Tensor, schema: Schema, groups: list[str], fraction: float, path: Path
) -> TrainTest:
    features = Preprocessing(schema).of(rows.raw)
    if rows.units is not None:
        held_out = np.array([is_held_out(unit.encode(), fraction) for unit in rows.units])
    else:
        held_out = np.array([is_held_out(x.tobytes(), fraction) for x in features.numpy()])
    refuse_empty(int((~held_out).sum()), int(held_out.sum()), str(path))
    train, test = (np.flatnonzero(side) for side in (~held_out, held_out))
    units = None if rows.units is None else tuple(rows.units[i] for i in train)
    facts = TableFacts(
        schema,
        units,
        rows.skipped,
        {name: tuple(rows.kept[name][i] for i in test) for name in groups},
    )
    return TrainTest(
        train=Examples(features[train], labels[train]),
        test=Examples(features[test], labels[test]),
        classes=schema.label.classes or (),
        input_shape=(features.shape[1],),
        source=f"{'Parquet' if path.suffix in ('.parquet', '.pq') else 'CSV'} file {path}",
        preparation={"kind": "table"},
        table=facts,
    )
