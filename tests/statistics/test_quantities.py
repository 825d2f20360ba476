"""What is asked of a column, by its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dptorch.errors import ConfigurationError
from dptorch.statistics.quantities import Choice, Numeric, layout


@pytest.mark.parametrize("log", [False, True])
def test_the_rows_of_a_number_are_its_definition(log):
    asked = Numeric("x", (1.0, 9.0), missing=True, bins=4, log=log)
    values = np.array([1.0, 2.5, 9.0, -7.0, 100.0, math.nan])
    found = asked.rows(values)
    for value, row in zip(values, found, strict=True):
        if math.isnan(value):
            assert not row.any()
            continue
        inside = min(max(value, 1.0), 9.0)
        t = (inside - 5.0) / 4.0
        place = next(i for i in range(4) if inside <= asked.edges[i + 1] or i == 3)
        if inside == asked.edges[place + 1] and place < 3:
            place += 1  # an inner edge belongs to the bin above it
        # The square root of the prefix sum is 1, 1/2, 3/8, 5/16.
        column = ([0.0] * place + [1.0, 0.5, 0.375, 0.3125])[:4]
        size = math.sqrt(1 + 1 / 4 + 9 / 64 + 25 / 256)
        assert row.tolist() == pytest.approx([1, t, 2 * t * t - 1, *(c / size for c in column)])
    ratios = asked.edges[1:] / asked.edges[:-1]
    assert (len(set(ratios.round(6))) == 1) is log


def test_the_rows_of_a_choice_are_its_definition():
    asked = Choice("sex", ("f", "m", "missing"), missing=True)
    assert asked.rows(np.array([1.0, 0.0, math.nan])).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    without = Choice("sex", ("f", "m"))
    assert without.rows(np.array([1.0, 5.0, -1.0])).tolist() == [[0, 1], [0, 0], [0, 0]]


def test_blocks_follow_each_other():
    blocks = layout(
        [Numeric("x", (0, 1), bins=3), Choice("y", ("a", "b")), Numeric("z", (0, 1), True, 0)]
    )
    assert [(b.name, b.kind, b.start, b.stop) for b in blocks] == [
        ("x", "mean", 0, 1), ("x", "square", 1, 2), ("x", "prefix", 2, 5),
        ("y", "histogram", 5, 7),
        ("z", "present", 7, 8), ("z", "mean", 8, 9), ("z", "square", 9, 10),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Numeric("x", (1, 1)), "low < high"),
        (lambda: Numeric("x", (0, math.inf)), "finite"),
        (lambda: Numeric("x", (math.nan, 1)), "finite"),
        (lambda: Numeric("x", (0, 1), log=True), "above 0"),
        (lambda: Numeric("x", (0, 1), bins=1), "bins=1"),
        (lambda: Numeric("x", (0, 1), bins=5000), "2 to 1024"),
        (lambda: Numeric("x", (-1e308, 1e308)), "finite"),
        (lambda: Numeric("x", (0, 5e-324)), "finite"),
        (lambda: Choice("x", ()), "public list"),
        (lambda: Choice("x", ("a", "b", "a")), "'a' is there twice"),
        (lambda: layout([]), "at least one"),
        (lambda: layout([Numeric("x", (0, 1)), Choice("x", ("a",))]), "each column once"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
