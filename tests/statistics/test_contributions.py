"""What a unit contributes: bounded exactly, whoever else is there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dptorch.clipping.sums import RoundedSum
from dptorch.errors import DataError
from dptorch.statistics.contributions import integer_sum, share_of_block, unit_means
from dptorch.statistics.quantities import Choice, Numeric, layout

BOUND = RoundedSum.UNITS**2
ASKED = [
    [Numeric("x", (-3.0, 7.0), bins=0)],
    [Numeric("x", (-3.0, 7.0), missing=True, bins=5)],
    [Choice("x", ("a", "b", "c", "missing"), missing=True)],
    [
        Numeric("x", (0.1, 7.0), missing=True, bins=9, log=True),
        Choice("y", ("a", "b"), missing=True),
        Numeric("z", (0.0, 1.0), missing=True),
    ],
]


def values_for(asked, rows, seed):
    """Random values, at and beyond the bounds, and missing ones."""
    chance = np.random.default_rng(seed)
    columns = []
    for quantity in asked:
        if isinstance(quantity, Choice):
            column = chance.integers(0, len(quantity.values), rows).astype(float)
        else:
            low, high = quantity.bounds
            column = chance.choice([low, high, low - 5, 2 * high + 9, (low + high) / 2, 0.3], rows)
        columns.append(np.where(quantity.missing & (chance.random(rows) < 0.2), math.nan, column))
    return np.stack(columns, axis=1)


def sums(asked, values, owners=None):
    return integer_sum(asked, unit_means(asked, values, owners))


@pytest.mark.parametrize("asked", ASKED, ids=range(len(ASKED)))
@pytest.mark.parametrize("rows_each", [1, 7])
def test_one_unit_moves_the_sum_by_no_more_than_the_bound(asked, rows_each):
    values = values_for(asked, 40 * rows_each, seed=rows_each)
    people = [f"p{i % 40}" for i in range(len(values))] if rows_each > 1 else None
    whole, units = sums(asked, values, people)
    assert units == 40
    lengths = []
    for person in range(40):
        rest = np.arange(len(values)) % 40 != person
        left, _ = sums(
            asked, values[rest], people and [p for p, r in zip(people, rest, strict=True) if r]
        )
        lengths.append(sum(int(r) ** 2 for r in whole - left))
    assert max(lengths) <= BOUND
    if rows_each == 1:
        assert max(lengths) > 0.5 * BOUND  # the bound is not idle
    # The broken twin: contributions that are longer are left out, whole.
    longer = [part * 1.5 for part in unit_means(asked, values[:1])]
    kept, _ = integer_sum(asked, longer)
    assert sum(int(r) ** 2 for r in kept) <= BOUND


def test_a_unit_that_is_too_long_or_not_finite_is_left_out():
    asked = [Numeric("x", (0, 1), bins=0)]
    each = share_of_block(2)
    parts = [np.array([[1.0, 1.0], [1.0, 1.1], [math.nan, 0.0], [math.inf, 0.0], [0.5, -1.0]])]
    total, units = integer_sum(asked, parts)
    assert total.tolist() == [each + math.trunc(0.5 * each), 0]
    assert units == 5


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (1, 68), (66,), (1, 1, 66)])
def test_parts_of_another_shape_are_refused(shape):
    """NumPy would spread a narrow one over all coordinates: 22 times the bound."""
    with pytest.raises(DataError, match="the coordinates of what is asked for"):
        integer_sum([Numeric("x", (0, 1), bins=64)], [np.ones(shape)])


def test_a_part_in_half_precision_is_measured_in_full():
    asked = [Numeric("x", (0, 1), bins=1024)]
    (part,) = unit_means(asked, np.array([[0.0]]))
    total, _ = integer_sum(asked, [part.astype(np.float32)])
    assert sum(int(r) ** 2 for r in total) <= BOUND


def test_the_order_of_rows_changes_nothing():
    asked = ASKED[3]
    values = values_for(asked, 9000, seed=3)
    owners = np.array([str(i % 977) for i in range(len(values))])
    order = np.random.default_rng(0).permutation(len(values))
    assert np.array_equal(sums(asked, values)[0], sums(asked, values[order])[0])
    found = sums(asked, values, owners)[0]
    shuffled = sums(asked, values[order], owners[order])[0]
    # The mean of a unit's rows is rounded: by the last bit of a unit of 2**-24.
    assert np.abs(found - shuffled).max() <= 977


def test_a_persons_rows_count_as_their_mean():
    asked = [Numeric("x", (-1.0, 1.0), bins=2)]
    values = np.array([[0.5], [1.0], [-1.0], [0.0]])
    (parts,) = unit_means(asked, values, ["b", "a", "b", "b"])
    assert parts.tolist() == [
        [1.0, 1.0, 0.0, pytest.approx(1 / math.sqrt(1.25))],
        # -1, 0 and 1/2: one value in the first bin, whose column is 1, 1/2, and two in the second.
        pytest.approx(
            [-0.5 / 3, (1 - 1 - 0.5) / 3, *(c / 3 / math.sqrt(1.25) for c in (1.0, 2.5))]
        ),
    ]


def test_shares_fill_the_bound():
    for blocks in range(1, 300):
        each = share_of_block(blocks)
        assert blocks * each**2 <= BOUND < blocks * (each + 1) ** 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[math.inf]], "row 0, column 'x': the value is infinite"),
        ([[0.0], [math.nan]], "row 1, column 'x': the value is missing"),
        ([[0.0, 1.0]], "Expected \\[rows, columns\\]"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        sums([Numeric("x", (0, 1))], np.array(values))


def test_many_rows_of_one_person_are_one_part():
    asked = [Numeric("x", (0.0, 1.0), bins=0)]
    parts = list(unit_means(asked, np.full((20_000, 1), 0.5), ["a"] * 15_000 + ["b"] * 5_000))
    assert [len(part) for part in parts] == [1, 1]
    assert layout(asked)[-1].stop == 2
