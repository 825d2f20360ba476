"""The bound on the sampled discrete Gaussian, against sums over the integers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dptorch import accounting
from dptorch.accounting import Adjacency, SampledDiscreteGaussian, SampledGaussian
from dptorch.accounting.accountants.rdp import _one_step, renyi_orders
from dptorch.accounting.pairs.discrete_gaussian import DiscretePair
from dptorch.errors import PrivacyError

ORDERS = (2, 3, 5, 8, 16)


def divergence(p: np.ndarray, q: np.ndarray, order: int) -> float:
    """Rényi divergence of two mass functions, where float64 can tell them from 0."""
    inside = (p > 1e-290) & (q > 1e-290)
    log = order * np.log(p[inside]) + (1 - order) * np.log(q[inside])
    top = log.max()
    return float((top + np.log(np.exp(log - top).sum())) / (order - 1))


def masses(scale: float, mean: tuple[int, ...], reach: int) -> np.ndarray:
    """Of the discrete Gaussian around an integer vector, on a box of the integer lattice."""
    x = np.arange(-reach, reach + 1)
    axes = [np.exp(-((x - m) ** 2) / (2 * scale**2)) for m in mean]
    found = axes[0] / axes[0].sum()
    for axis in axes[1:]:
        found = np.multiply.outer(found, axis / axis.sum())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("scale", [0.8, 2.0, 5.0])
@pytest.mark.parametrize("shift", [(1,), (2, 0), (1, 1), (2, 1), (3, -2)])
def test_the_bound_holds_in_both_directions(
    shift: tuple[int, ...], scale: float, rate: float
) -> None:
    norm = math.sqrt(sum(v * v for v in shift))
    multiplier = scale / norm
    reach = math.ceil(12 * scale + 16 * max(abs(v) for v in shift)) + 4
    if len(shift) == 2:
        reach = min(reach, 130)
    q = masses(scale, (0,) * len(shift), reach)
    r = masses(scale, shift, reach)
    p = (1 - rate) * q + rate * r
    bound = dict(
        zip(renyi_orders(), _one_step(DiscretePair("remove", multiplier, rate, 1)), strict=True)
    )
    for order in ORDERS:
        assert divergence(p, q, order) <= bound[order] * (1 + 1e-9) + 1e-12
        assert divergence(q, p, order) <= bound[order] * (1 + 1e-9) + 1e-12


def test_the_bound_is_tight_without_sampling() -> None:
    q, r = masses(3.0, (0,), 200), masses(3.0, (2,), 200)
    found = divergence(r, q, 3)
    assert found == pytest.approx(3 * 4 / (2 * 9.0), rel=1e-9)


def test_a_bound_for_a_smaller_shift_is_caught() -> None:
    """Negative control: rounding that lengthens contributions breaks the stated bound."""
    q, r = masses(3.0, (0, 0), 130), masses(3.0, (3, 1), 130)
    stated = dict(zip(renyi_orders(), _one_step(DiscretePair("remove", 1.0, 1.0, 1)), strict=True))
    assert divergence(r, q, 3) > stated[3]


def test_it_costs_what_the_gaussian_costs_at_integer_orders() -> None:
    for sigma, rate, steps in ((0.8, 0.02, 1), (1.0, 0.01, 1000), (5.0, 1.0, 10), (20.0, 1.0, 9)):
        discrete = [SampledDiscreteGaussian(sigma, rate, steps)]
        gaussian = [SampledGaussian(sigma, rate, steps)]
        get = accounting.get_accountant("rdp").epsilon
        assert get(gaussian, 1e-5) - 1e-9 <= get(discrete, 1e-5) <= 1.1 * get(gaussian, 1e-5)


def test_replacement_is_covered_without_sampling_only() -> None:
    rdp = accounting.get_accountant("rdp")
    whole = [SampledDiscreteGaussian(2.0, 1.0, 10)]
    found = rdp.epsilon(whole, 1e-5, adjacency=Adjacency.REPLACE_ONE)
    assert found == pytest.approx(rdp.epsilon([SampledDiscreteGaussian(1.0, 1.0, 10)], 1e-5))
    with pytest.raises(PrivacyError, match="not covered"):
        rdp.epsilon([SampledDiscreteGaussian(2.0, 0.1, 10)], 1e-5, adjacency=Adjacency.REPLACE_ONE)


@pytest.mark.parametrize("name", [n for n in accounting.accountant_names() if n != "rdp"])
def test_other_accountants_refuse_it_by_name(name: str) -> None:
    with pytest.raises(PrivacyError, match=r"does not cover .*discrete Gaussian.*These do: rdp"):
        accounting.get_accountant(name).epsilon([SampledDiscreteGaussian(1.0, 0.1, 10)], 1e-5)
