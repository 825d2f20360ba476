"""Statistics of a table in a file, whose schema says what is public about its columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dptorch.errors import ConfigurationError, DataError, one_of
from dptorch.statistics.contributions import unit_means
from dptorch.statistics.quantities import Choice, Numeric, Quantity
from dptorch.statistics.releases import Statistics, release
from dptorch.tables import Encoded, Schema, encode, open_table
from dptorch.tables.columns import Boolean, Category, Column, Date, Number, days_since_1970
from dptorch.tables.faults import Faults

__all__ = ["describe_table", "quantities_of"]


def describe_table(
    path: str | Path,
    schema: Schema | str | Path,
    *,
    columns: Sequence[str] | None = None,
    bins: int = 64,
    **terms: Any,
) -> Statistics:
    """Release statistics of the columns of a table.

    Where the schema has a unit, ε protects a person with all their rows.

    Args:
        path: of the table.
        schema: bounds of numbers and values of categories; see `dptorch.tables`. Dates are in days
            since 1970-01-01. Texts have no statistics.
        columns: which, in this order; None for all that have statistics, the label too.
        bins: of the histograms of numbers, from which quantiles are read; 0 for none.
        terms: see `dptorch.statistics.release`.

    Raises:
        DataError: the file cannot be read, or rows do not fit. None are left out: how many there are is
            published, and would tell which cells fit.
        ConfigurationError: a column has no statistics, or the schema no bounds for it.
    """
    if not isinstance(schema, Schema):
        schema = Schema.read(schema)
    quantities = quantities_of(schema, columns, bins)
    table = open_table(Path(path), schema.file)
    faults = Faults(str(path), table.place)
    rows = encode(schema, table.chunks(faults), faults, skip=False)
    if not len(rows):
        raise DataError(f"{path}: no rows.")
    return release(
        quantities,
        unit_means(quantities, _values(schema, rows, quantities), rows.units),
        units=len(rows) if rows.units is None else len(set(rows.units)),
        unit="example" if rows.units is None else "user",
        read_from_data=schema.read_from_data,
        **terms,
    )


def quantities_of(schema: Schema, columns: Sequence[str] | None, bins: int) -> list[Quantity]:
    """What can be asked of the columns of a schema.

    Raises:
        ConfigurationError: a column that was asked for is not in it or has no statistics; one has no
            bounds.
    """
    found = dict[str, Quantity]()
    for name, column in schema.columns.items():
        if (columns is None or name in columns) and (asked := _quantity(name, column, bins)):
            found[name] = asked
    label = schema.label
    if columns is None or label.column in columns:
        if label.bounds is not None:
            found[label.column] = Numeric(label.column, label.bounds, bins=bins)
        elif label.classes is not None:
            found[label.column] = Choice(label.column, label.classes)
    for name in columns or ():
        one_of("columns", name, list(_all(schema)))
        if name not in found:
            raise ConfigurationError(
                f"columns={name!r} has no statistics: in the schema it is dropped, a text, or a label "
                "without classes."
            )
    return list(found.values()) if columns is None else [found[name] for name in columns]


def _all(schema: Schema) -> list[str]:
    return [*schema.columns, schema.label.column]


def _quantity(name: str, column: Column, bins: int) -> Quantity | None:
    if isinstance(column, Number):
        if column.bounds is None:
            raise ConfigurationError(
                f"the schema has no bounds for {name!r}. Say what it can hold, which its meaning "
                "tells; if nothing closer is known, wide bounds with 'log': true."
            )
        return Numeric(name, column.bounds, missing=column.missing, bins=bins, log=column.log)
    if isinstance(column, Date):
        first, last = (days_since_1970(day, None) for day in column.bounds)
        assert first is not None
        assert last is not None
        return Numeric(name, (first, last), missing=column.missing, bins=bins)
    if isinstance(column, Boolean | Category):
        values = ["no", "yes"] if isinstance(column, Boolean) else list(column.values)
        values += ["other"] if getattr(column, "other", False) else []
        values += ["missing"] if column.missing else []
        return Choice(name, tuple(values), missing=column.missing)
    return None


def _values(schema: Schema, rows: Encoded, quantities: Sequence[Quantity]) -> Any:
    """float64 [rows, quantities]."""
    start, places = 0, dict[str, int]()
    for name, column in schema.columns.items():
        places[name] = start
        start += column.width
    return np.stack(
        [
            np.asarray(rows.labels, np.float64)
            if q.name == schema.label.column
            else rows.raw[:, places[q.name]]
            for q in quantities
        ],
        axis=1,
    )
