"""The part of a model that turns numbers into features: saved and exported with it.

Every operation looks at one row, and every constant is the schema's.

Shapes: B rows, D raw numbers, F features.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dptorch.tables.columns import Boolean, Category, Column, Date, Number, Text, days_since_1970
from dptorch.tables.schema import Schema

__all__ = ["Preprocessing"]


class Preprocessing(nn.Module):
    """Features of the rows of a table.

    =========  =======================================================================================
    number     clipped to its bounds and scaled to [-1, 1]; or as it is, without bounds
    date       the same, in days
    boolean    1 or -1
    category   one feature for each value (1 or 0), one for "other" if that is allowed
    text       counts of words by bucket, divided by their norm
    =========  =======================================================================================

    Where cells may be missing, one more feature says so (1 or 0), and the others are those of the fill:
    the middle for dates, 0 for a boolean, no value for a category.

    Args:
        schema: says what the columns are.

    Guarantees:
        Each feature of a row depends on that row alone.
        Held by `test_what_a_row_becomes_depends_on_that_row_alone`.

    Example:
        >>> from dptorch.tables.schema import Label
        >>> columns = {"age": Number((0.0, 100.0), missing=True), "sex": Category(("f", "m"))}
        >>> features = Preprocessing(Schema(Label("sick", ("no", "yes")), columns))
        >>> features.names
        ('age', 'age is missing', 'sex: f', 'sex: m', 'sex: other')
        >>> features(torch.tensor([[75.0, 0.0], [math.nan, 2.0]], dtype=torch.float64)).tolist()
        [[0.5, 0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 1.0]]
    """

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self._columns: tuple[tuple[str, Column], ...] = tuple(schema.columns.items())
        self.width = sum(column.width for _, column in self._columns)

    @property
    def names(self) -> tuple[str, ...]:
        """What each feature is."""
        return tuple(name for n, column in self._columns for name in _names(n, column))

    @property
    def features(self) -> int:
        """Number of features F."""
        return len(self.names)

    def forward(self, raw_BD: Tensor) -> Tensor:
        """Features, float32 [B, F], of raw numbers, float64 [B, D] with NaN where a cell is empty."""
        parts, at = [], 0
        for _, column in self._columns:
            x = raw_BD[:, at : at + column.width]
            at += column.width
            parts += _features(column, x)
        return torch.cat(parts, dim=1).to(torch.float32)

    def of(self, raw: np.ndarray[Any, np.dtype[np.float64]]) -> Tensor:
        """Features of an array, in parts."""
        with torch.no_grad():
            parts = [self(part) for part in torch.from_numpy(raw).split(65536)]
        return torch.cat(parts) if parts else torch.empty(0, self.features)


def _names(name: str, column: Column) -> list[str]:
    missing = [f"{name} is missing"] if getattr(column, "missing", False) else []
    if isinstance(column, Category):
        other = [f"{name}: other"] if column.other else []
        return [f"{name}: {value}" for value in column.values] + other + missing
    if isinstance(column, Text):
        return [f"{name}: words {i}" for i in range(column.buckets)]
    return [name, *missing] if column.width else []


def _features(column: Column, x: Tensor) -> list[Tensor]:
    if isinstance(column, Number | Date):
        low, high, fill, log = _range(column)
        scaled = x
        if fill is not None:
            scaled = torch.where(torch.isnan(x), fill, x)
        if low is not None and high is not None:
            scaled = scaled.clamp(low, high)
            if log:
                scaled, low, high = scaled.log(), math.log(low), math.log(high)
            scaled = (scaled - low) * (2 / (high - low)) - 1
        return [scaled, *_missing(column, x)]
    if isinstance(column, Boolean):
        return [torch.where(torch.isnan(x), 0.5, x) * 2 - 1, *_missing(column, x)]
    if isinstance(column, Category):
        places = torch.arange(len(column.values) + column.other, dtype=x.dtype)
        return [(x == places.to(x.device)).to(x.dtype), *_missing(column, x)]
    if isinstance(column, Text):
        return [x / x.square().sum(1, keepdim=True).sqrt().clamp_min(1.0)]
    return []


def _missing(column: Any, x: Tensor) -> list[Tensor]:
    return [torch.isnan(x).to(x.dtype)] if column.missing else []


def _range(column: Number | Date) -> tuple[float | None, float | None, float | None, bool]:
    """(low, high, fill, log) of a number, or of a date in days."""
    if isinstance(column, Date):
        low, high = (days_since_1970(day) for day in column.bounds)
        assert low is not None
        assert high is not None
        return low, high, (low + high) / 2 if column.missing else None, False
    if column.bounds is None:
        return None, None, column.fill if column.missing else None, False
    low, high = column.bounds
    middle = math.sqrt(low * high) if column.log else (low + high) / 2
    fill = middle if column.fill is None else column.fill
    return low, high, fill if column.missing else None, column.log
