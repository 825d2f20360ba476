"""The Gram norm in C for float32 on a CPU: `gram.c`, used if it agrees with torch.

Shape legend: B examples, T positions, P rows (outputs), D columns (inputs).
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dptorch.native import Units, checked_library, run_in_team

__all__ = ["ROWS", "SOURCE", "GramLibrary", "gram_library"]

SOURCE: Final = Path(__file__).with_name("gram.c")
# As in gram.c, which writes a sum for each strip: with a larger number here it would write past them.
ROWS: Final = 8
"""Rows of a strip, the unit of work."""

_PAIR = ctypes.c_int64 * 2


class _Gram(ctypes.Structure):
    """`Gram` of gram.c."""

    _fields_ = (
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("examples", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("left_columns", ctypes.c_int64),
        ("right_columns", ctypes.c_int64),
        ("left_strides", _PAIR),
        ("right_strides", _PAIR),
        ("sums", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p * 2),
        ("units", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("next", ctypes.c_int64),
    )


class GramLibrary:
    """What gram.c does, with some of the processor's instruction sets; AVX2 is one of them.

    Attributes:
        units: those that it uses.
    """

    def __init__(self, library: ctypes.CDLL, units: Units) -> None:
        self.units = units
        self._library = library
        self._function: Any = library.gram_norms
        self._function.restype = None

    def limited(self, units: Units) -> GramLibrary:
        """The same, with no other instruction sets than these."""
        return GramLibrary(self._library, self.units & units)

    def norms(self, left: Tensor, right: Tensor, threads: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `dptorch.tape.gradients.gram.gram_norm_and_lengths`; no size may be 0."""
        # Rows are read as they lie. Examples and positions may be any distance
        # apart, so that a layout with the positions first is not copied.
        left, right = (x if x.stride(2) == 1 else x.contiguous() for x in (left, right))
        b, t, p = left.shape
        strips = -(-t // ROWS)
        # A number for each strip, added up below in one order,
        # so that the number of threads does not matter.
        # Dtype and device are named: the user may have set other defaults.
        sums = torch.empty(b, strips, dtype=torch.float64, device="cpu")
        lengths = torch.empty(2, b, t, dtype=torch.float32, device="cpu")
        threads = max(1, min(threads, b * strips))
        job = _Gram(
            left.data_ptr(),
            right.data_ptr(),
            b,
            t,
            p,
            right.shape[2],
            _PAIR(*left.stride()[:2]),
            _PAIR(*right.stride()[:2]),
            sums.data_ptr(),
            (ctypes.c_void_p * 2)(lengths[0].data_ptr(), lengths[1].data_ptr()),
            self.units,
            threads,
            0,
        )
        run_in_team(self._function, job, threads)
        lengths.sqrt_()
        return sums.sum(1).clamp_(min=0).float(), lengths[0], lengths[1]


@functools.lru_cache(maxsize=1)
def gram_library() -> GramLibrary | None:
    """The library, or None where there is no compiler, the processor lacks AVX2, or it errs."""
    return checked_library(SOURCE, GramLibrary, _agrees)


def _agrees(library: GramLibrary) -> bool:
    """With float64, on sizes with every kind of remainder, the last in several strips at once; and on
    factors that are views."""
    generator = torch.Generator("cpu").manual_seed(0)
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    for b, t, p, d in (
        (1, 1, 1, 1),
        (2, 5, 3, 1100),
        (3, 8, 513, 16),
        (9, 21, 40, 7),  # whole examples to each thread
        (1, 530, 3, 500),
    ):
        wide = torch.randn(b, t, p + 3, **kind)
        left = wide[:, :, 1 : p + 1]
        right = torch.randn(t, b, d, **kind).transpose(0, 1)
        squared, *lengths = library.norms(left, right, threads=2)
        formed = torch.bmm(left.double().transpose(1, 2), right.double())
        truths = (
            formed.square().sum((1, 2)),
            left.double().norm(dim=2),
            right.double().norm(dim=2),
        )
        for value, truth in zip((squared, *lengths), truths, strict=True):
            if not torch.allclose(value.double(), truth, rtol=1e-5, atol=0):
                return False
    return True
