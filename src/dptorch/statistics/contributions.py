"""From rows to the sum of what each unit contributes, in whole numbers: nothing is rounded after it.

A unit's vector is rounded towards zero, to multiples of 2**-24 of the bound on its norm, which makes it
no longer (`dptorch.clipping.rounding` does the same to gradients). Sums of integers are exact, in any
order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dptorch.clipping.sums import RoundedSum
from dptorch.errors import DataError
from dptorch.statistics.quantities import Floats, Quantity, layout

__all__ = ["integer_sum", "share_of_block", "unit_means"]

_ROWS: Final = 8192


def share_of_block(blocks: int) -> int:
    """What a 1 in one of so many blocks counts, in units of 2**-24: the largest m with K m² <= 2**48.

    Example:
        >>> share_of_block(1) == 2**24, share_of_block(2), share_of_block(3)
        (True, 11863283, 9686330)
    """
    return math.isqrt(RoundedSum.UNITS**2 // blocks)


def unit_means(
    quantities: Sequence[Quantity], values: Floats, owners: Sequence[str] | None = None
) -> Iterable[Floats]:
    """What each unit contributes, in parts: float64 [units of the part, coordinates].

    Args:
        quantities: a column each.
        values: [N, quantities], a row each; NaN for what is missing.
        owners: the unit of each row, as a text; None where a row is a unit.

    Raises:
        DataError: a value is infinite, or missing where none may be.
    """
    _refuse_bad(quantities, values)
    if owners is None:
        for start in range(0, len(values), _ROWS):
            yield _rows(quantities, values[start : start + _ROWS])
        return
    numbers = {owner: i for i, owner in enumerate(sorted(set(owners)))}
    place = np.array([numbers[owner] for owner in owners])
    order = np.argsort(place, kind="stable")
    counts = np.bincount(place)
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        begin = ends[first] - counts[first]
        last = int(np.searchsorted(ends, begin + _ROWS, "right"))
        last = max(last, first + 1)  # at least one unit, however many rows it has
        rows = _rows(quantities, values[order[begin : ends[last - 1]]])
        starts = ends[first:last] - counts[first:last] - begin
        yield np.add.reduceat(rows, starts, axis=0) / counts[first:last, None]
        first = last


def integer_sum(
    quantities: Sequence[Quantity], parts: Iterable[Floats]
) -> tuple[NDArray[np.int64], int]:
    """Add up what units contribute.

    Args:
        quantities: a column each.
        parts: of units, as `unit_means` gives them.

    Returns:
        int64 [coordinates], in units of 2**-24, and the number of units.

    Guarantees:
        One unit moves the sum by an integer vector r with ``sum r**2 <= 2**48``, decided exactly. A
        unit that is longer, by whatever error before, is left out.
        Held by `test_one_unit_moves_the_sum_by_no_more_than_the_bound`.
    """
    blocks = layout(quantities)
    each = share_of_block(len(blocks))
    total, units = np.zeros(blocks[-1].stop, np.int64), 0
    for values in parts:
        part = np.asarray(values, np.float64)
        if part.ndim != 2 or part.shape[1] != len(total):
            # NumPy would spread a narrower part over all coordinates, past the bound.
            raise DataError(
                f"a part of shape {list(part.shape)}: expected [units, {len(total)}], the coordinates "
                "of what is asked for. Use unit_means or picture_means."
            )
        with np.errstate(all="ignore"):
            whole = np.trunc(part * each)
            whole = np.where(np.isfinite(whole), whole, np.inf)
            kept = np.square(whole).sum(1) <= float(RoundedSum.UNITS) ** 2
        total += whole[kept].astype(np.int64).sum(0)
        units += len(part)
    return total, units


def _rows(quantities: Sequence[Quantity], values: Floats) -> Floats:
    return np.concatenate([q.rows(values[:, i]) for i, q in enumerate(quantities)], axis=1)


def _refuse_bad(quantities: Sequence[Quantity], values: Floats) -> None:
    if values.ndim != 2 or values.shape[1] != len(quantities):
        raise DataError(
            f"values of shape {list(values.shape)} for {len(quantities)} columns. Expected [rows, "
            "columns]."
        )
    for i, quantity in enumerate(quantities):
        infinite = np.flatnonzero(np.isinf(values[:, i]))
        missing = np.flatnonzero(np.isnan(values[:, i]))
        if len(infinite):
            raise DataError(f"row {infinite[0]}, column {quantity.name!r}: the value is infinite.")
        if len(missing) and not quantity.missing:
            raise DataError(
                f"row {missing[0]}, column {quantity.name!r}: the value is missing. Say that it may "
                "be: missing=True."
            )
