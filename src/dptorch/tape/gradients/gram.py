"""Norms of sums of outer products from Gram matrices, tile by tile.

Shape legend: B examples, T positions, P rows (outputs), D columns (inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dptorch.tape.gradients.gram_native import ROWS, GramLibrary, gram_library

__all__ = ["gram_cost", "gram_flops", "gram_norm", "gram_norm_and_lengths", "gram_tile"]

# Flops from which on C takes less than the calls of torch that it saves; compiled once a machine.
_LARGE = 1e6


def gram_tile(positions: int) -> int:
    """Rows of one tile of torch's own products: few enough to skip most of the symmetric half, many
    enough for a fast product.

    Example:
        >>> gram_tile(64), gram_tile(1024)
        (32, 64)
    """
    return 32 if positions < 256 else 64


def gram_flops(positions: int, rows: int, columns: int, tile: int) -> float:
    """Flops of `gram_norm` for one example, by tiles of so many rows."""
    computed = positions * (positions + min(tile, positions)) / 2
    return 2 * computed * (rows + columns)


def gram_cost(left: Tensor, right: Tensor) -> tuple[float, float]:
    """Flops of `gram_norm` for all examples, and the bytes that it moves beside its products."""
    b, t, p = left.shape
    d, size = right.shape[2], left.element_size()
    if _native(left, right) is not None:
        return b * gram_flops(t, p, d, ROWS), 0.0
    tile = gram_tile(t)
    # Each tile is written by two products, multiplied and summed.
    return b * gram_flops(t, p, d, tile), 5.0 * size * b * t * (t + tile) / 2


def gram_norm(left: Tensor, right: Tensor) -> Tensor:
    """``||sum_t left[b, t] (x) right[b, t]||^2 = sum((L L^T) * (R R^T))`` for each example, [B].

    The Gram matrices are symmetric and only their sum is wanted, so they are made a strip at a time
    up to the diagonal: [B, T, T] is never stored and nearly half of it never computed. Where it can
    be compiled (C, on a CPU; Triton, on CUDA) one kernel does it without storing anything.

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
    return gram_norm_and_lengths(left, right)[0]


def gram_norm_and_lengths(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`gram_norm`, and the lengths of the factors' rows, which are on the way: [B], [B, T], [B, T]."""
    library = _native(left, right)
    if library is not None:
        return library.norms(left, right, torch.get_num_threads())
    lengths = (torch.linalg.vector_norm(x, dim=2) for x in (left, right))
    return (_in_strips(left, right), *lengths)


def _native(left: Tensor, right: Tensor) -> GramLibrary | None:
    if left.device.type != "cpu" or left.dtype != torch.float32:
        return None
    b, t, p = left.shape
    if not left.numel() or not right.numel():
        return None
    large = b * gram_flops(t, p, right.shape[2], ROWS) >= _LARGE
    return gram_library() if large else None


def _in_strips(left: Tensor, right: Tensor) -> Tensor:
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
