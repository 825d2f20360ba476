"""The discrete Gaussian: an exact sampler, exact sums, an exact bound."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from dptorch.clipping.rounding import rounded_sum
from dptorch.clipping.sums import ClippedSum, RoundedSum
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.noise import DiscreteGaussianNoise, GaussianNoise, discrete
from dptorch.noise.discrete import DISCRETE_BLOCK, DiscreteNormals
from dptorch.randomness import RootKey

FALSE_ALARM = 1e-7
UNITS = RoundedSum.UNITS
KEY = RootKey.from_seed(4)


def key_of(index: int) -> bytes:
    return hashlib.sha256(index.to_bytes(8, "big")).digest()


def draws(scale: float | Fraction, blocks: int = 6) -> NDArray[np.int64]:
    normals = DiscreteNormals(key_of, scale)
    return np.concatenate([normals.block(i) for i in range(blocks)])


def law(scale: float, reach: int) -> NDArray[np.float64]:
    """Masses of -reach ... reach."""
    x = np.arange(-reach, reach + 1)
    mass = np.exp(-(x**2) / (2.0 * scale**2))
    return mass / mass.sum()


def chi_square(found: NDArray[np.int64], scale: float) -> float:
    """p-value of the counts against the law; rare values are one cell at either end."""
    reach = math.ceil(12 * scale) + 3
    expected = law(scale, reach) * len(found)
    cells = np.flatnonzero(expected >= 10)
    low, high = cells[0], cells[-1]
    at = np.clip(found + reach, low, high) - low
    counts = np.bincount(at, minlength=high - low + 1)
    wanted = expected[low : high + 1].copy()
    wanted[0] += expected[:low].sum()
    wanted[-1] += expected[high + 1 :].sum()
    if len(wanted) == 1:
        return 1.0
    return float(stats.chisquare(counts, wanted * (counts.sum() / wanted.sum())).pvalue)


# False alarm: 1e-7 each. Powers of two and their neighbours, where the proposal changes.
@pytest.mark.parametrize("scale", [0.35, 0.7, 1.0, 1.41, 1.42, 3.0, 22.6, 22.7, 50.0])
def test_the_sampler_has_the_law(scale: float) -> None:
    assert chi_square(draws(scale), scale) > FALSE_ALARM


@pytest.mark.parametrize("scale", [float(UNITS), 1.3 * UNITS, 0.05 * UNITS, 1000.0 * UNITS])
def test_at_scales_of_training_it_is_the_normal_law(scale: float) -> None:
    """By the lower bits, which must be uniform, and by the distribution as a whole."""
    found = draws(scale)
    assert stats.kstest((found + 0.0) / scale, "norm").pvalue > FALSE_ALARM
    low = np.bincount(found & 63, minlength=64)
    assert stats.chisquare(low).pvalue > FALSE_ALARM
    assert abs((found / scale).std() - 1) < 5.5 / math.sqrt(2 * len(found))


def _off_by_half(normals: DiscreteNormals) -> None:
    normals._centre += Fraction(1, 2)


def _variance_too_small(normals: DiscreteNormals) -> None:
    normals._variance *= Fraction(85, 100)


def _no_acceptance(normals: DiscreteNormals) -> None:
    normals._centre, normals._variance = Fraction(0), Fraction(10**12)


@pytest.mark.parametrize("twin", [_off_by_half, _variance_too_small, _no_acceptance])
def test_a_sampler_that_is_broken_is_caught(twin: Callable[[DiscreteNormals], None]) -> None:
    normals = DiscreteNormals(key_of, 3.0)
    twin(normals)
    found = np.concatenate([normals.block(i) for i in range(6)])
    assert chi_square(found, 3.0) < FALSE_ALARM


def test_zero_is_not_drawn_twice_as_often() -> None:
    """The broken twin keeps both signs of zero."""
    found = draws(1.0)
    extra = np.where(np.arange(len(found)) % 4 == 0, 0, found)
    assert chi_square(extra, 1.0) < FALSE_ALARM


def test_the_exact_decisions_make_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float64 is not trusted at all, everything goes the long way, to the same end."""
    fast = DiscreteNormals(key_of, 2.5)._candidates(discrete._Words(key_of(0)), 500)
    monkeypatch.setattr(discrete, "_DOUBT", 0.999)
    slow = DiscreteNormals(key_of, 2.5)._candidates(discrete._Words(key_of(0)), 500)
    assert (fast == slow).all()


def test_a_decision_takes_as_many_bits_as_it_needs() -> None:
    x = Fraction(1, 3)
    true = int(math.exp(-1 / 3) * 2**53)
    asked = 0

    def more() -> int:
        nonlocal asked
        asked += 1
        return 0

    assert discrete._Uniform((true - 2) << 11, more).below_exp(x)
    assert not discrete._Uniform((true + 2) << 11, more).below_exp(x)
    assert asked == 0
    # The word that agrees with exp(-1/3) in all of its 64 bits says nothing yet.
    from decimal import Context, Decimal, localcontext

    with localcontext(Context(prec=50)):
        word = int((-Decimal(1) / 3).exp() * 2**64)
    assert discrete._Uniform(word, more).below_exp(x)
    assert asked > 0
    assert not discrete._Uniform(word, lambda: 2**64 - 1).below_exp(x)
    assert not discrete._Uniform(1, more).below_exp(Fraction(2000))
    assert discrete._Uniform(2**64 - 1, lambda: 2**64 - 1).below_exp(Fraction(0))


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**45])
def test_scales_out_of_reach_are_refused(scale: float) -> None:
    with pytest.raises(ConfigurationError, match="scale"):
        DiscreteNormals(key_of, scale)


# -- rounding --------------------------------------------------------------------------------------


def test_one_row_moves_the_sum_by_no_more_than_the_bound() -> None:
    """By brute force in Python integers, over rows of all lengths and shapes, clipped to the bound by
    float32 arithmetic that errs on either side."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        size = 10 ** (trial % 4)
        g = torch.randn(4, size, generator=generator) * 10.0 ** (trial % 7 - 3)
        g[0] = g[0].abs().max()  # all equal, so that every rounding goes one way
        norms = g.norm(dim=1)
        c = (0.7 / norms) * (1 + 3e-7 * torch.randn(4, generator=generator))
        whole = rounded_sum({"w": g}, c, {"w": 0.7})["w"]
        for i in range(4):
            keep = torch.arange(4) != i
            moved = (whole - rounded_sum({"w": g[keep]}, c[keep], {"w": 0.7})["w"]).tolist()
            squared = sum(x * x for x in moved)
            assert squared <= UNITS**2
            assert squared >= 0.998 * UNITS**2, "nothing honest is dropped"


def test_rounding_to_the_nearest_without_room_breaks_the_bound() -> None:
    """Negative control: the bound that this rounding keeps is not kept for nothing."""
    size = 1_000_000
    g = torch.full((1, size), 0.5001)
    unit = 1.0  # of a coarse grid: a contribution of norm 500 in units
    nearest = (g / unit).round()
    assert float(nearest.norm()) > 1.9 * float(g.norm())


def test_rows_that_are_too_long_or_not_finite_are_left_out() -> None:
    good = torch.tensor([[0.3, 0.4], [0.0, 0.5]])
    c = torch.ones(2)
    expected = rounded_sum({"w": good}, c, {"w": 1.0})["w"]
    for bad in ([2.0, 0.0], [math.nan, 0.0], [math.inf, 0.0], [1.0, 1.0], [1e30, 1e30]):
        rows = torch.cat([good, torch.tensor([bad])])
        for weight in (1.0, 0.0):
            found = rounded_sum({"w": rows}, torch.tensor([1.0, 1.0, weight]), {"w": 1.0})["w"]
            assert torch.equal(found, expected)


def test_the_bound_is_joint_and_in_units_of_each_scale() -> None:
    g = {"a": torch.tensor([[0.08]]), "b": torch.tensor([[1.2]])}
    scales = {"a": 0.1, "b": 2.0}  # norm 1: 0.8**2 + 0.6**2
    found = rounded_sum(g, torch.ones(1), scales)
    squared = sum(int(v.item()) ** 2 for v in found.values())
    assert 0.999 * UNITS**2 < squared <= UNITS**2
    half = rounded_sum(g, torch.full((1,), 0.5), scales, share=0.5)
    assert sum(int(v.item()) ** 2 for v in half.values()) <= (UNITS // 2) ** 2
    assert not rounded_sum(g, torch.ones(1), scales, share=0.5)["a"].any()


# -- the mechanism ---------------------------------------------------------------------------------


def noised(values: dict[str, torch.Tensor], step: int = 0, scale: float = 1.5) -> torch.Tensor:
    noisy = DiscreteGaussianNoise(scale).privatize(RoundedSum(values, 2.0), KEY, step)
    return torch.cat([v.flatten() for v in noisy.values.values()])


def zeros(size: int = 40_000) -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(size, dtype=torch.int64), "b": torch.zeros(7, 3, dtype=torch.int64)}


def test_sum_and_noise_are_added_exactly() -> None:
    big = {"w": torch.full((1000,), 2**52 + 1)}  # float64 has no such odd number beyond 2**53
    noise = {"w": torch.zeros(1000, dtype=torch.int64)}
    DiscreteGaussianNoise(1.0).privatize(RoundedSum(noise, 1.0), KEY, 0)
    DiscreteGaussianNoise(1.0).privatize(RoundedSum(big, 1.0), KEY, 0)
    assert torch.equal(big["w"] - noise["w"], torch.full((1000,), 2**52 + 1))
    assert (noise["w"] % 2 == 1).any()


def test_noise_has_the_stated_size_and_place() -> None:
    flat = noised(zeros())
    assert abs(float(flat.double().std()) / 3.0 - 1) < 5.5 / math.sqrt(2 * flat.numel())
    assert torch.equal(flat, noised({"all": torch.zeros(40_021, dtype=torch.int64)}))
    assert float((flat == noised(zeros(), step=1)).double().mean()) < 1e-3
    parts = torch.zeros(40_021)
    for a, b in ((0, 9), (9, DISCRETE_BLOCK + 5), (DISCRETE_BLOCK + 5, 40_021)):
        part = RoundedSum({"all": torch.zeros(b - a, dtype=torch.int64)}, 2.0)
        noisy = DiscreteGaussianNoise(1.5).privatize(part, KEY, 0, offsets={"all": a})
        parts[a:b] = noisy.values["all"]
    assert torch.equal(flat, parts)


def test_the_types_refuse_each_other() -> None:
    floats = ClippedSum({"w": torch.zeros(3)}, 1.0)
    with pytest.raises(TypeError, match="round each contribution first"):
        DiscreteGaussianNoise(1.0).privatize(floats, KEY, 0)
    with pytest.raises(PrivacyError, match="int64"):
        GaussianNoise(1.0).privatize(RoundedSum(zeros(), 1.0), KEY, 0)
    with pytest.raises(PrivacyError, match="not int64"):
        DiscreteGaussianNoise(1.0).privatize(RoundedSum({"w": torch.zeros(3)}, 1.0), KEY, 0)
