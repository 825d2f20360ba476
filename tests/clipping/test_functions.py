"""Clipping functions: the bound, what happens to what is not finite, and their formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dptorch.clipping import FUNCTIONS, coefficients
from dptorch.errors import ConfigurationError

NORMS = st.lists(
    st.one_of(
        st.floats(0, 1e30, allow_subnormal=True),
        st.sampled_from([0.0, float("inf"), float("nan")]),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
@given(norms=NORMS, bound=st.floats(1e-6, 1e6))
def test_no_contribution_exceeds_the_bound(function: str, norms: list[float], bound: float) -> None:
    n = torch.tensor(norms, dtype=torch.float64)
    c = coefficients(n, bound, function)
    assert c.isfinite().all()
    assert (c >= 0).all()
    finite = n.isfinite()
    assert (c[finite] * n[finite] <= bound * (1 + 1e-12)).all()
    assert (c[~finite] == 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32_stays_within_one_rounding(function: str) -> None:
    n = torch.rand(100_000) * 10
    c = coefficients(n, 0.7, function)
    assert (c.double() * n.double()).max() <= 0.7 * (1 + 2**-22)


def test_formulas() -> None:
    n = torch.tensor([0.0, 0.5, 4.0], dtype=torch.float64)
    expected = {
        "abadi": [1.0, 1.0, 0.5],
        "automatic": [200.0, 2 / 0.51, 2 / 4.01],
        "normalised": [0.0, 4.0, 0.5],
        "global": [1.0, 1.0, 0.0],
    }
    assert set(expected) == set(FUNCTIONS)
    for name, values in expected.items():
        found = coefficients(n, 2.0, name)
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64))


def test_unknown_function_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigurationError, match="'abadi', 'automatic', 'normalised', 'global'"):
        coefficients(torch.ones(1), 1.0, "autov")


def test_a_function_that_breaks_the_bound_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the first test."""
    monkeypatch.setitem(FUNCTIONS, "abadi", lambda n, bound: torch.ones_like(n))
    with pytest.raises(AssertionError):
        test_no_contribution_exceeds_the_bound.hypothesis.inner_test("abadi", [3.0], 1.0)
