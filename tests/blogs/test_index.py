"""The two published formulas: their values in ForgetNet's releases, and a second computation."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest

from dptorch.blogs.allocation import per_step
from dptorch.blogs.index import Index0121, Index2024, make_index
from dptorch.errors import ConfigurationError

# Values printed by release 0.1.18 (C = 1) and 0.1.21 (q = 64/60000).
PRINTED_2024 = {
    (1, 1): 4.0,
    (2, 1): 1.877376206789787,
    (10, 1): 0.16909158908025795,
    (128, 1): 0.003019041753605581,
    (1000, 1): 1.3057252201064e-4,
}
PRINTED_0121 = {(1000, 1000): 0.53333, (10, 10): 0.0053333, (1, 1): 0.00053333}


@pytest.mark.parametrize(("group", "printed"), PRINTED_2024.items())
def test_a_group_has_the_printed_value_of_0_1_18(group, printed):
    assert Index2024(1.0, 1e-5).of_group(*group) == pytest.approx(printed, rel=1e-11)


@pytest.mark.parametrize(("group", "printed"), PRINTED_0121.items())
def test_a_group_has_the_printed_value_of_0_1_21(group, printed):
    assert Index0121(64 / 60000).of_group(*group) == pytest.approx(printed, rel=1e-5)


@pytest.mark.parametrize("clip", [0.5, 1.0])
def test_one_block_has_4_c(clip):
    assert Index2024(clip, 1e-5).of_group(37, 37) == pytest.approx(4 * clip, rel=1e-14)


def test_the_network_of_the_report_has_the_printed_total():
    index = Index2024(1.0, 1e-5)
    total = index.after(100, per_step(index, [416, 4640, 15690], [5, 62, 213]))
    assert total == pytest.approx(0.9967604505677801, rel=1e-12)


@pytest.mark.parametrize("clip", [1e-3, 1.0, 50.0, 1e4])
@pytest.mark.parametrize(("size", "block"), [(3, 1), (100, 7), (10**6, 1), (10**6, 5 * 10**5)])
def test_the_2024_formula_agrees_with_fifty_digits(clip, size, block):
    mpmath.mp.dps = 50
    d, b, c = mpmath.mpf(size), mpmath.mpf(block), mpmath.mpf(clip)
    alone = 2 * mpmath.log(1 + d * (mpmath.exp(2 * c / mpmath.sqrt(d)) - 1))
    blocks = 2 * mpmath.log(1 + b / d * (mpmath.exp(2 * c * mpmath.sqrt(b / d)) - 1))
    expected = float(min(alone, blocks))
    assert Index2024(clip, 1e-5).of_group(size, block) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("index", [Index2024(1.0, 1e-5), Index0121(0.01)])
def test_the_index_starts_at_nothing_and_grows_with_every_step(index):
    values = [index.after(t, 0.02) for t in range(200)]
    assert values[0] == 0.0
    assert all(a < b for a, b in itertools.pairwise(values))


def test_composition_over_steps_is_the_published_one():
    e, t, delta = 0.03, 500, 1e-6
    expected = math.sqrt(2 * t * math.log(1 / delta)) * e + t * e * (math.exp(e) - 1)
    assert Index2024(1.0, delta).after(t, e) == pytest.approx(expected, rel=1e-12)
    assert Index2024(1.0, delta).after(1, 701.0) == math.inf
    assert Index0121(0.1).after(t, e) == pytest.approx(t * e, rel=1e-15)


def test_delta_is_what_each_release_reported():
    assert Index2024(1.0, 1e-6).delta == 1e-6
    assert Index0121(0.1).delta == 0.0


def test_a_name_that_is_no_index_is_answered_with_the_nearest():
    with pytest.raises(ConfigurationError, match="'2024'"):
        make_index("2042", clip_value=1.0, delta=1e-5, batch_size=1, dataset_size=None)


def test_0_1_21_asks_for_the_size_of_the_data():
    with pytest.raises(ConfigurationError, match="dataset_size"):
        make_index("0.1.21", clip_value=1.0, delta=1e-5, batch_size=64, dataset_size=None)
    with pytest.raises(ConfigurationError, match="between 1 and"):
        make_index("0.1.21", clip_value=1.0, delta=1e-5, batch_size=64, dataset_size=60)
