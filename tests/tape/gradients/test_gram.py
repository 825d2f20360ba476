"""Gram norms: strips and the Triton kernel against formed gradients."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dptorch.native import LIMIT, SWITCH, Units
from dptorch.tape.gradients import gram, gram_native
from dptorch.tape.gradients.gram import gram_flops, gram_norm, gram_tile

SIZES = [(2, 1, 3, 4), (3, 31, 5, 2), (2, 32, 4, 4), (3, 100, 20, 40), (2, 300, 7, 33)]


def formed(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("btp,btd->bpd", left, right).square().sum((1, 2))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_strips_give_the_formed_norm(size: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    b, t, p, d = size
    left, right = torch.randn(b, t, p).double(), torch.randn(b, d, t).double().transpose(1, 2)
    torch.testing.assert_close(gram_norm(left, right), formed(left, right), rtol=1e-12, atol=0)


def test_a_twin_that_forgets_the_mirror_image_is_caught() -> None:
    left, right = torch.randn(2, 100, 3).double(), torch.randn(2, 100, 4).double()
    gram = torch.tril(left @ left.mT) * torch.tril(right @ right.mT)
    assert not torch.allclose(gram.sum((1, 2)), formed(left, right), rtol=1e-3)


def test_nothing_of_size_t_squared_is_stored_and_half_is_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest, flops = 0, 0.0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest, flops
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            if func is torch.ops.aten.bmm.default:
                flops += 2 * out.numel() * args[0].shape[2]
            return out

    b, t, p, d = 1, 1024, 8, 16
    left, right = torch.randn(b, t, p), torch.randn(b, t, d)
    monkeypatch.setattr(gram, "gram_library", lambda: None)
    with Watch():
        gram_norm(left, right)
    assert largest <= t * gram_tile(t)
    assert flops == pytest.approx(gram_flops(t, p, d, gram_tile(t)), rel=1e-6)
    assert flops < 0.56 * 2 * t * t * (p + d)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this file's, so that the right library is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library that is looked for again, as in a new process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv(LIMIT, raising=False)
    gram_native.gram_library.cache_clear()
    yield
    gram_native.gram_library.cache_clear()


needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler here"
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "size", [*SIZES, (2, 9, 512, 513), (1, 40, 1, 2000), (1, 530, 7, 500), (9, 21, 30, 40)], ids=str
)
def test_the_c_kernel_gives_the_formed_norm(
    library: None, size: tuple[int, int, int, int], threads: int
) -> None:
    """To float32's precision; also of factors whose rows lie apart, or whose numbers do."""
    found = gram_native.gram_library()
    if found is None:
        pytest.skip("this processor has no AVX2; torch's own products are used")
    torch.manual_seed(0)
    b, t, p, d = size
    for left, right in (
        (torch.randn(b, t, p), torch.randn(b, t, d)),
        (torch.randn(t, b, p).transpose(0, 1), torch.randn(b, d, t).transpose(1, 2)),
        (torch.randn(b, t, p + 5)[:, :, 3 : p + 3], torch.randn(2 * b, t, d)[::2]),
    ):
        truth = formed(left.double(), right.double())
        for kernel in (found, found.limited(Units.AVX2)):
            squared, *lengths = kernel.norms(left, right, threads)
            torch.testing.assert_close(squared.double(), truth, rtol=1e-6, atol=0)
            for length, factor in zip(lengths, (left, right), strict=True):
                torch.testing.assert_close(length, factor.norm(dim=2), rtol=1e-6, atol=0)


@needs_compiler
def test_the_c_kernel_keeps_what_is_not_finite_to_its_example(library: None) -> None:
    found = gram_native.gram_library()
    if found is None:
        pytest.skip("this processor has no AVX2; torch's own products are used")
    left, right = torch.randn(4, 20, 30), torch.randn(4, 20, 30)
    left[1, 7, 3], right[2, 19, 29] = float("nan"), float("inf")
    squared = found.norms(left, right, 2)[0]
    assert squared.isfinite().tolist() == [True, False, False, True]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_c_kernel_does_not_ask_for_torchs_defaults(library: None, dtype: torch.dtype) -> None:
    """It wrote float32 numbers into memory of the user's default type, and past its end."""
    left, right = torch.randn(8, 300, 40), torch.randn(8, 300, 30)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            squared, *lengths = gram.gram_norm_and_lengths(left, right)
            assert gram_native.gram_library() is None or gram._native(left, right) is not None
    finally:
        torch.set_default_dtype(torch.float32)
    truth = formed(left.double(), right.double())
    torch.testing.assert_close(squared.double(), truth, rtol=1e-4, atol=0)
    for length, factor in zip(lengths, (left, right), strict=True):
        torch.testing.assert_close(length, factor.norm(dim=2), rtol=1e-6, atol=0)


def test_a_factor_without_columns_has_norm_zero() -> None:
    for p, d in ((200, 0), (0, 200)):
        left, right = torch.randn(8, 512, p), torch.randn(8, 512, d)
        assert gram_norm(left, right).tolist() == [0.0] * 8


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("sets", "right", "wrong"),
    [
        ("avx2", "sum += 2.0 * below", "sum += below"),  # the mirror image
        ("avx2", "if (k < depth)", "if (k > depth)"),  # columns that are left over
        ("avx2", "column < first + row + TALL", "column < first + row"),  # the diagonal
        ("avx2", "gram + i * pitch", "gram"),  # several strips at once
        ("avx2", "factor_of(job, example, 1)", "factor_of(job, 0, 1)"),
        ("avx2", "at * f->stride + from, depth", "at * f->stride, depth"),
        ("avx2", "memset(gram, 0", "memset(gram, 66"),
        ("avx2", "x, y, start < 0 ? 0 : start, below", "x, y, start < 8 ? 0 : start, below"),
        ("avx2", "total[i % 2]);", "total[0]);"),
        ("avx2,avx512", "_mm512_add_pd(even, odd)", "even"),
        ("avx2,avx512", "(1 << (depth - k)) - 1 : 0xffff", "0xffff : 0xffff"),
        ("avx2,avx512", "_MM_SHUFFLE(2, 3, 0, 1)", "_MM_SHUFFLE(3, 2, 1, 0)"),
        ("avx2,avx512", "a + i * PITCH + k);\n#pragma", "a + k);\n#pragma"),
    ],
)
def test_a_c_kernel_that_errs_is_not_used(
    library: None, monkeypatch: pytest.MonkeyPatch, sets: str, right: str, wrong: str
) -> None:
    monkeypatch.setenv(LIMIT, sets)
    read = type(gram_native.SOURCE).read_bytes
    if gram_native.gram_library() is None:
        pytest.skip("this processor has no AVX2; torch's own products are used")
    if "avx512" in sets and Units.AVX512 not in gram_native.gram_library().units:
        pytest.skip("this processor has no AVX-512; the code for it is not run")
    gram_native.gram_library.cache_clear()
    assert right.encode() in gram_native.SOURCE.read_bytes()
    monkeypatch.setattr(
        type(gram_native.SOURCE),
        "read_bytes",
        lambda path: read(path).replace(right.encode(), wrong.encode()),
    )
    assert gram_native.gram_library() is None


@needs_compiler
def test_large_norms_on_a_cpu_come_from_c(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randn(4, 128, 256), torch.randn(4, 128, 256)
    by_default = gram_norm(left, right)
    monkeypatch.setenv(SWITCH, "0")
    gram_native.gram_library.cache_clear()
    assert gram_native.gram_library() is None
    by_torch = gram_norm(left, right)
    torch.testing.assert_close(by_default, by_torch, rtol=1e-5, atol=0)
    torch.testing.assert_close(by_default, formed(left, right), rtol=1e-5, atol=0)


_KERNEL = """
import torch
from dptorch.tape.gradients.gram_triton import gram_norm_triton
torch.manual_seed(0)
for b, t, p, d in SIZES:
    left, right = torch.randn(b, t, p), torch.randn(b, d, t).transpose(1, 2)
    truth = torch.einsum("btp,btd->bpd", left.double(), right.double()).square().sum((1, 2))
    error = (gram_norm_triton(left, right) / truth - 1).abs().max().item()
    assert error < 1e-6, (b, t, p, d, error)
print("the kernel agrees")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
def test_the_triton_kernel_agrees_in_its_interpreter() -> None:
    """In a process of its own: Triton reads its switch when a kernel is made."""
    found = subprocess.run(
        [sys.executable, "-c", _KERNEL.replace("SIZES", repr(SIZES))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert "the kernel agrees" in found.stdout, found.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [*SIZES, (16, 512, 768, 3072)], ids=str)
def test_the_triton_kernel_agrees_on_a_gpu(size: tuple[int, int, int, int]) -> None:
    from dptorch.tape.gradients.gram_triton import gram_norm_triton

    b, t, p, d = size
    left, right = torch.randn(b, t, p, device="cuda"), torch.randn(b, t, d, device="cuda")
    truth = formed(left.double(), right.double())
    assert (gram_norm_triton(left, right) / truth - 1).abs().max() < 1e-5
