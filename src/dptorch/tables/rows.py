"""Rows in memory as a chunk of cells: a DataFrame, a table of pyarrow, columns or records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dptorch.errors import DataError
from dptorch.tables.columns import Cells
from dptorch.tables.files import Chunk

__all__ = ["chunk_of"]


def chunk_of(rows: Any, names: Sequence[str] = ()) -> Chunk:
    """Rows in memory.

    Args:
        rows: a pandas, polars or pyarrow table, a mapping from column to cells, one mapping from column
            to cell, a list of such mappings, or an array [N, D] whose columns are `names` in order.
        names: of the columns of an array.

    Raises:
        DataError: it is none of these, or the columns differ in length.

    Example:
        >>> chunk = chunk_of([{"age": 3, "sex": "f"}, {"age": 4}])
        >>> chunk.columns
        {'age': [3, 4], 'sex': ['f', None]}
        >>> len(chunk_of({"age": 3, "sex": "f"}))
        1
    """
    columns: dict[str, Cells]
    if hasattr(rows, "to_pydict"):  # pyarrow
        columns = dict(rows.to_pydict())
    elif hasattr(rows, "columns") and hasattr(rows, "__getitem__"):  # pandas, polars
        columns = {str(name): _cells(rows[name]) for name in rows.columns}
    elif isinstance(rows, Mapping):
        single = not any(_is_column(value) for value in rows.values())
        columns = {str(k): [v] if single else _cells(v) for k, v in rows.items()}
    elif hasattr(rows, "shape") or (_is_column(rows) and len(rows) and _is_column(rows[0])):
        columns = _of_array(rows, names)
    elif _is_column(rows) and all(isinstance(row, Mapping) for row in rows):
        keys = dict.fromkeys(str(key) for row in rows for key in row)
        columns = {key: [row.get(key) for row in rows] for key in keys}
    else:
        raise DataError(
            f"rows of type {type(rows).__name__} cannot be read. Expected a DataFrame, a mapping from "
            "column to values, or a list of such rows."
        )
    lengths = {len(cells) for cells in columns.values()}
    if len(lengths) > 1:
        raise DataError(f"the columns have different lengths: {sorted(lengths)}.")
    return Chunk(columns, range(lengths.pop() if lengths else 0))


def _of_array(rows: Any, names: Sequence[str]) -> dict[str, Cells]:
    array = np.asarray(rows)
    if array.ndim != 2 or array.shape[1] != len(names):
        raise DataError(
            f"an array of shape {array.shape} does not have the columns {', '.join(names)}. Expected "
            f"(N, {len(names)}), in this order."
        )
    return {name: array[:, i] for i, name in enumerate(names)}


def _is_column(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | bytes | Mapping)


def _cells(column: Any) -> Cells:
    array = np.asarray(column)
    if array.dtype.kind in "biuf":
        return array
    return list(column)
