"""Gram norms: strips and the Triton kernel against formed gradients."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

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


def test_nothing_of_size_t_squared_is_stored_and_half_is_not_computed() -> None:
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
    with Watch():
        gram_norm(left, right)
    assert largest <= t * gram_tile(t)
    assert flops == pytest.approx(gram_flops(t, p, d), rel=1e-6)
    assert flops < 0.56 * 2 * t * t * (p + d)


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


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
def test_the_triton_kernel_agrees_in_its_interpreter() -> None:
    """In a process of its own: Triton reads its switch when a kernel is made."""
    found = subprocess.run(
        [sys.executable, "-c", _KERNEL.replace("SIZES", repr(SIZES))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
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
