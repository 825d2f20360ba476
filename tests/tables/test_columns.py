"""How the cells of each kind of column are read."""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np
import pytest

from dptorch.tables.columns import Boolean, Category, Column, Date, Drop, Number, Text

DAYS = (datetime.date(2020, 1, 1), datetime.date(2021, 1, 1))
NAN = math.nan


def read(column: Column, cells: Any) -> tuple[list[Any], list[int]]:
    """What cells become, and which do not fit."""
    faults: list[int] = []
    found = column.read(cells, lambda i, what: faults.append(i))
    assert found.shape == (len(cells), column.width)
    return found[:, 0].tolist() if column.width else [], faults


@pytest.mark.parametrize(
    ("column", "cells", "numbers", "faults"),
    [
        (Number(), ["1", " 2.5 ", "-3e2"], [1, 2.5, -300], []),
        (Number(), ["1", "x", "", "inf", "NA"], [1, NAN, NAN, NAN, NAN], [1, 2, 3, 4]),
        (Number(missing=True), ["1", "", "NA", None, "x"], [1, NAN, NAN, NAN, NAN], [4]),
        (Number(decimal=","), ["1,5", "2"], [1.5, 2], []),
        (Number(), np.array([1, 2]), [1, 2], []),
        (Number(), np.array([1.0, NAN, math.inf]), [1, NAN, 0], [1, 2]),
        (Number(missing=True), np.array([1.0, NAN]), [1, NAN], []),
        (Number(), [True, 2], [1, 2], []),
        (Category(("a", "b")), ["b", " a", "c", ""], [1, 0, 2, NAN], [3]),
        (Category(("a", "b"), other=False), ["b", "c"], [1, NAN], [1]),
        (Category(("a",), missing=True), [None, "NA", "a"], [NAN, NAN, 0], []),
        (Category(("NA", "SA"), missing=True), ["NA", "SA", ""], [0, 1, NAN], []),
        (Category(("1", "2"), other=False), [1, 2.0, "1.0", "2"], [0, 1, 0, 1], []),
        (Boolean(), ["yes", "No", "TRUE", "0", True, "?", ""], [1, 0, 1, 0, 1, NAN, NAN], [5, 6]),
        (Boolean(("ja",), ("nein",), missing=True), ["Ja", "nein", ""], [1, 0, NAN], []),
        (Date(DAYS), ["1970-01-02", "1970-01-01T12:00", "soon", ""], [1, 0.5, NAN, NAN], [2, 3]),
        (Date(DAYS, "%d.%m.%Y", missing=True), ["02.01.1970", "1970-01-02", ""], [1, NAN, NAN], [1]),
        (Date(DAYS), [datetime.date(1970, 1, 3), np.datetime64("1970-01-02")], [2, 1], []),
        (Date(DAYS), [datetime.datetime(1970, 1, 2), "1970-01-02T00:00:00Z"], [1, 1], []),
        (Drop(), ["x", ""], [], []),
    ],
)  # fmt: skip
def test_cells_become_numbers(column: Column, cells: Any, numbers: Any, faults: Any) -> None:
    found, bad = read(column, cells)
    assert bad == faults
    np.testing.assert_array_equal(found, numbers)


def test_words_are_counted_by_a_fixed_hash() -> None:
    """Python's own hash of a text differs from one process to the next."""
    found = Text(8).read(["Fever, fever!", "", "cough"], lambda i, what: None)
    assert found.sum(1).tolist() == [2, 0, 1]
    assert found[0].max() == 2
    assert (found[0].argmax(), found[2].argmax()) == (1, 4)
