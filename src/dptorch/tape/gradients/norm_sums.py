"""Gradients of a layer norm's shift and scale in C, for float32 on a CPU: `norm_sums.c`, used if it
agrees with torch.

Shape legend: B examples, T positions, D columns.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dptorch.native import Units, checked_library, run_in_team

__all__ = ["SOURCE", "NormLibrary", "norm_library", "norm_sums"]

SOURCE: Final = Path(__file__).with_name("norm_sums.c")

# Elements from which on C takes less than the calls of torch that it saves; compiled once a machine.
_LARGE = 2**14


class _Sums(ctypes.Structure):
    """`Sums` of norm_sums.c."""

    _fields_ = (
        ("gradients", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p),
        ("means", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("examples", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("of_shift", ctypes.c_void_p),
        ("of_scale", ctypes.c_void_p),
        ("units", ctypes.c_int64),
        ("next", ctypes.c_int64),
    )


class NormLibrary:
    """The compiled loop.

    Args:
        library: of `SOURCE`.
        units: the instruction sets that it may use.
    """

    def __init__(self, library: ctypes.CDLL, units: Units) -> None:
        self.units = units
        self._library = library
        self._function: Any = library.norm_sums
        self._function.restype = None

    def limited(self, units: Units) -> NormLibrary:
        """The same, with no other instruction sets than these."""
        return NormLibrary(self._library, self.units & units)

    def sums(
        self, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, threads: int
    ) -> tuple[Tensor, Tensor]:
        """See `norm_sums`."""
        g, x, mean, rstd = (t.contiguous() for t in (g, x, mean, rstd))
        b, t, d = g.shape
        # Whatever the user's default dtype and device are.
        found = torch.empty(2, b, d, dtype=torch.float32, device="cpu")
        job = _Sums(
            g.data_ptr(), x.data_ptr(), mean.data_ptr(), rstd.data_ptr(), b, t, d,
            found[0].data_ptr(), found[1].data_ptr(), self.units, 0,
        )  # fmt: skip
        run_in_team(self._function, job, max(1, min(threads, b)))
        return found[0], found[1]


def norm_sums(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a layer norm's shift and scale, [B, D] each.

    Args:
        g: output gradients, [B, T, D].
        x: inputs, [B, T, D].
        mean, rstd: of the rows of `x`, [B, T, 1].

    Example:
        >>> g, x = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
        >>> mean, rstd = x.mean(2, keepdim=True), 1 / x.std(2, keepdim=True)
        >>> shift, scale = norm_sums(g, x, mean, rstd)
        >>> torch.allclose(shift, g.sum(1), atol=1e-5)
        True
        >>> torch.allclose(scale, (g * (x - mean) * rstd).sum(1), atol=1e-5)
        True
    """
    if g.device.type == "cpu" and g.dtype == torch.float32 and g.numel() >= _LARGE:
        library = norm_library()
        if library is not None:
            return library.sums(g, x, mean, rstd, torch.get_num_threads())
    # sum_t g (x - mean) rstd, as two products of a row with a matrix
    scaled = torch.bmm(rstd.transpose(1, 2), g * x)
    scaled -= torch.bmm((mean * rstd).transpose(1, 2), g)
    return g.sum(1), scaled[:, 0]


@functools.lru_cache(maxsize=1)
def norm_library() -> NormLibrary | None:
    """The library, or None where there is no compiler, the processor lacks AVX2, or it errs."""
    return checked_library(SOURCE, NormLibrary, _agrees)


def _agrees(library: NormLibrary) -> bool:
    """With float64, on sizes with every kind of remainder."""
    generator = torch.Generator("cpu").manual_seed(0)
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    for b, t, d in ((1, 1, 1), (3, 6, 17), (2, 67, 40), (2, 131, 7)):
        g, x = (torch.randn(b, t, d, **kind) for _ in range(2))
        mean, rstd = (torch.rand(b, t, 1, **kind) for _ in range(2))
        terms = g.double(), g.double() * (x.double() - mean.double()) * rstd.double()
        for found, term in zip(library.sums(g, x, mean, rstd, threads=2), terms, strict=True):
            # Of numbers that cancel the error is that of the terms.
            if not bool(((found - term.sum(1)).abs() <= 1e-6 * term.abs().sum(1)).all()):
                return False
    return True
