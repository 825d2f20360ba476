"""The tiled Gram norm as one Triton kernel: nothing but [B] partial sums leaves the chip.

Shape legend: B examples, T positions, P rows (outputs), D columns (inputs).
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["available", "gram_norm_triton"]

# Positions of a tile and features of a step. Tensor cores want at least 16 of each.
_TILE = 64
_STEP = 32


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(  # type: ignore[no-untyped-def]
        left, right, out, T, P, D,
        lb, lt, lp, rb, rt, rd,
        TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        # One program for each pair of tiles (row >= column) of one example.
        pair, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
        # The row of the pair in a lower triangle; corrected, as the root is rounded.
        row = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) / 2.0).to(tl.int32)
        row = tl.where(row * (row + 1) // 2 > pair, row - 1, row)
        row = tl.where((row + 1) * (row + 2) // 2 <= pair, row + 1, row)
        column = pair - row * (row + 1) // 2
        rows = row * TILE + tl.arange(0, TILE)
        columns = column * TILE + tl.arange(0, TILE)
        steps = tl.arange(0, STEP)
        gram_l = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, P, STEP):
            at = start + steps
            x = tl.load(
                left + b * lb + rows[:, None] * lt + at[None, :] * lp,
                mask=(rows[:, None] < T) & (at[None, :] < P), other=0.0,
            )  # fmt: skip
            y = tl.load(
                left + b * lb + columns[None, :] * lt + at[:, None] * lp,
                mask=(columns[None, :] < T) & (at[:, None] < P), other=0.0,
            )  # fmt: skip
            gram_l += tl.dot(x, y, input_precision=PRECISION)
        gram_r = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, D, STEP):
            at = start + steps
            x = tl.load(
                right + b * rb + rows[:, None] * rt + at[None, :] * rd,
                mask=(rows[:, None] < T) & (at[None, :] < D), other=0.0,
            )  # fmt: skip
            y = tl.load(
                right + b * rb + columns[None, :] * rt + at[:, None] * rd,
                mask=(columns[None, :] < T) & (at[:, None] < D), other=0.0,
            )  # fmt: skip
            gram_r += tl.dot(x, y, input_precision=PRECISION)
        total = tl.sum(gram_l * gram_r)
        # A tile below the diagonal stands for its mirror image too.
        total = tl.where(row == column, total, 2.0 * total)
        tl.store(out + b * tl.num_programs(0) + pair, total)

    return kernel


def gram_norm_triton(left: Tensor, right: Tensor) -> Tensor:
    """`dptorch.tape.gradients.gram.gram_norm` for float32 factors on a GPU.

    Products are accumulated in float32, and multiplied in full precision unless
    ``torch.backends.cuda.matmul.allow_tf32`` says otherwise, as PyTorch's own are. The partial sums
    are added up in a fixed order, so that the result is the same each time.

    Args:
        left: [B, T, P], any strides.
        right: [B, T, D], same dtype.

    Returns:
        float32 [B].
    """
    b, t, p = left.shape
    tiles = -(-t // _TILE)
    pairs = tiles * (tiles + 1) // 2
    partial = torch.empty(b, pairs, device=left.device, dtype=torch.float32)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    _kernel()[(pairs, b)](
        left, right, partial, t, p, right.shape[2], *left.stride(), *right.stride(),
        TILE=_TILE, STEP=_STEP, PRECISION=precision,
    )  # fmt: skip
    return partial.sum(1).clamp_(min=0)
