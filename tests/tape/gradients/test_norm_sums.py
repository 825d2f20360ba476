"""Gradients of a layer norm's shift and scale in C, against sums that are formed."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dptorch
from dptorch.native import LIMIT, SWITCH, Units
from dptorch.tape.gradients import norm_sums

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler here"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this file's, so that the library is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[norm_sums.NormLibrary]:
    """A library that is looked for again, as in a new process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv(LIMIT, raising=False)
    norm_sums.norm_library.cache_clear()
    found = norm_sums.norm_library()
    if found is None:
        pytest.skip("this processor has no AVX2; torch's own products are used")
    yield found
    norm_sums.norm_library.cache_clear()


def drawn(b: int, t: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = 3 * torch.randn(b, t, d) + 1
    return torch.randn(b, t, d), x, x.mean(2, keepdim=True), 0.1 + torch.rand(b, t, 1)


def formed(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    g, x, mean, rstd = (t.double() for t in (g, x, mean, rstd))
    return g.sum(1), (g * (x - mean) * rstd).sum(1)


@needs_compiler
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 3, 8), (2, 70, 33), (3, 131, 16)], ids=str)
def test_the_c_loop_gives_the_formed_sums(
    library: norm_sums.NormLibrary, size: tuple[int, int, int]
) -> None:
    """By every instruction set, in any number of threads, of views too."""
    g, x, mean, rstd = drawn(*size)
    apart = torch.stack([g, g], 3)[..., 0]
    for kernel in (library, library.limited(Units.AVX2)):
        for threads, first in ((1, g), (2, apart), (5, g)):
            found = kernel.sums(first, x, mean, rstd, threads)
            for value, truth in zip(found, formed(g, x, mean, rstd), strict=True):
                torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-4)


@needs_compiler
def test_what_is_not_finite_stays_with_its_example(library: norm_sums.NormLibrary) -> None:
    g, x, mean, rstd = drawn(4, 20, 30)
    g[1, 7, 3], g[3, 19, 29] = float("nan"), float("inf")
    for found in library.sums(g, x, mean, rstd, 2):
        assert found.isfinite().all(1).tolist() == [True, False, True, False]


@needs_compiler
def test_a_layer_norm_has_the_gradients_that_each_example_has_alone(
    library: norm_sums.NormLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    norm, x, target = nn.LayerNorm(64), torch.randn(4, 80, 64), torch.randn(4, 80, 64)

    def largest_difference() -> float:
        with dptorch.record(norm) as tape:
            loss = (norm(x) * target).sum((1, 2)).sum()
        loss.backward()
        found = tape.per_example_gradients()
        worst = 0.0
        for i in range(len(x)):
            alone = torch.autograd.grad((norm(x[i]) * target[i]).sum(), list(norm.parameters()))
            for value, truth in zip(found.values(), alone, strict=True):
                worst = max(worst, float((value[i] - truth).abs().max()))
        return worst

    assert largest_difference() < 1e-4
    right = norm_sums.NormLibrary.sums

    def another_examples(*given: Any) -> tuple[Tensor, ...]:
        return tuple(found.roll(1, 0) for found in right(*given))

    monkeypatch.setattr(norm_sums.NormLibrary, "sums", another_examples)  # the broken twin
    assert largest_difference() > 1
