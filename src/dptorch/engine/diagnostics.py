"""Statistics of one step's clipping. They are exact functions of private data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["StepDiagnostics", "summarise"]


@dataclass(frozen=True)
class StepDiagnostics:
    """Exact functions of private data in the last logical batch: NOT PRIVATE. Do not publish.

    Attributes:
        examples: how many examples were in it.
        mean_norm: mean per-example gradient norm (NaN if there was none).
        clipped_fraction: fraction whose contribution was scaled down; under a group-wise style the
            fraction of all groups' contributions.
        dropped: how many were dropped, in whole or in some group, because their gradient was not
            finite.
        coefficients: least, median and largest clipping coefficient (NaN if there was no example).
    """

    examples: int
    mean_norm: float
    clipped_fraction: float
    dropped: int
    coefficients: tuple[float, float, float]


def summarise(measured: Sequence[Tensor]) -> StepDiagnostics:
    """Return the statistics of one step.

    Args:
        measured: norms and coefficients of each physical batch, [2, groups, B].
    """
    norms, c = torch.cat(list(measured), 2) if measured else torch.zeros(2, 1, 0)
    whole = norms.square().sum(0).sqrt()
    finite = whole.isfinite()
    clipped = (c * norms < norms * (1 - 1e-6)) & norms.isfinite()
    n = whole.numel()
    spread = (c.min(), c.median(), c.max()) if n else (torch.tensor(math.nan),) * 3
    return StepDiagnostics(
        examples=n,
        mean_norm=whole[finite].mean().item() if bool(finite.any()) else math.nan,
        clipped_fraction=clipped.float().mean().item() if n else math.nan,
        dropped=int((~finite).sum()),
        coefficients=(float(spread[0]), float(spread[1]), float(spread[2])),
    )
