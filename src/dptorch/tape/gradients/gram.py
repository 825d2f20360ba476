"""Norms of sums of outer products from Gram matrices, tile by tile.

Shape legend: B examples, T positions, P rows (outputs), D columns (inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gram_flops", "gram_norm", "gram_tile"]


def gram_tile(positions: int) -> int:
    """Rows of one tile: few enough to skip most of the symmetric half, many enough for a fast product.

    Example:
        >>> gram_tile(64), gram_tile(1024)
        (32, 64)
    """
    return 32 if positions < 256 else 64


def gram_flops(positions: int, rows: int, columns: int) -> float:
    """Flops of `gram_norm` for one example."""
    t = gram_tile(positions)
    computed = positions * (positions + min(t, positions)) / 2
    return 2 * computed * (rows + columns)


def gram_norm(left: Tensor, right: Tensor) -> Tensor:
    """``||sum_t left[b, t] (x) right[b, t]||^2 = sum((L L^T) * (R R^T))`` for each example, [B].

    The Gram matrices are symmetric and only their sum is wanted, so they are made a strip of columns
    at a time from the diagonal down: [B, T, T] is never stored and nearly half of it never computed.
    On CUDA with Triton one kernel does the same without storing anything.

    Args:
        left: [B, T, P], float32 or float64.
        right: [B, T, D], same dtype.

    Source: Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679.

    Example:
        >>> left, right = torch.randn(3, 100, 4), torch.randn(3, 100, 5)
        >>> formed = torch.einsum("btp,btd->bpd", left, right)
        >>> torch.allclose(gram_norm(left, right), formed.square().sum((1, 2)), rtol=1e-4)
        True
    """
    if left.is_cuda and left.dtype == torch.float32:
        from dptorch.tape.gradients.gram_triton import available, gram_norm_triton

        if available():
            return gram_norm_triton(left, right)
    positions = left.shape[1]
    tile = gram_tile(positions)
    squared = left.new_zeros(left.shape[0])
    for start in range(0, positions, tile):
        l_below, r_below = left[:, start:], right[:, start:]
        gram = torch.bmm(l_below, l_below[:, :tile].transpose(1, 2))  # [B, T - start, tile]
        gram *= torch.bmm(r_below, r_below[:, :tile].transpose(1, 2))
        by_row = gram.sum(2)
        # What lies below the diagonal tile stands for its mirror image too.
        squared += 2 * by_row.sum(1) - by_row[:, :tile].sum(1)
    return squared.clamp_(min=0)
