"""Round clipped gradients to integer vectors within the same bound, for discrete noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from dptorch.clipping.sums import RoundedSum

__all__ = ["rounded_sum"]

# Room for what float32 lost in norms and coefficients, so that no honest contribution is dropped.
_ROOM: Final = 1.0 - 2.0**-14


def rounded_sum(
    gradients: Mapping[str, Tensor],
    coefficients: Tensor,
    scales: Mapping[str, float],
    *,
    share: float = 1.0,
) -> dict[str, Tensor]:
    """``sum_b round(coefficients[b] * gradients[b])`` in units of ``scale / UNITS``, int64.

    Each coordinate is rounded towards zero, which makes no vector longer: |trunc(x)| <= |x| in every
    coordinate. (Rounding to the nearest would lengthen a vector of d coordinates by up to sqrt(d) / 2
    units, for which the clipping norm would have to make room; Kairouz et al. 2021, section 4.) A unit
    is 2**-24 of the scale, so that what is cut off is far below the noise of any useful multiplier.

    Args:
        gradients: parameter name -> [B, *shape], every example's gradient.
        coefficients: [B]; what clips them to norm `share`, in units of the scales.
        scales: parameter name -> scale, as in `ClippedSum`.
        share: bound on one row's norm in units of the scales; below 1 where several rows belong to
            one unit of privacy.

    Guarantees:
        One row moves the sum by an integer vector r with ``sum r**2 <= (share * UNITS)**2``, decided
        exactly: the squares of integers, added up in float64, are exact where they are near the
        bound. A row that is longer, by whatever error before, is left out, and so is one that is not
        finite.
        Held by `test_one_row_moves_the_sum_by_no_more_than_the_bound` and
        `test_rows_that_are_too_long_or_not_finite_are_left_out`.

    Example:
        >>> g = {"w": torch.tensor([[3.0, 4.0]])}
        >>> found = rounded_sum(g, torch.tensor([0.2]), {"w": 1.0})["w"]
        >>> (found.double() / RoundedSum.UNITS).round(decimals=3).tolist()
        [0.6, 0.8]
    """
    rows = coefficients.shape[0]
    bound = (share * RoundedSum.UNITS) ** 2
    weights = coefficients.double() * _ROOM
    whole: dict[str, Tensor] = {}
    squared = torch.zeros(rows, dtype=torch.float64, device=coefficients.device)
    for name, g in gradients.items():
        unit = scales[name] / RoundedSum.UNITS
        flat = g.detach().reshape(rows, -1).double()
        # A row with coefficient 0 may hold NaN, which 0 would not remove.
        r = torch.where(weights[:, None] > 0, flat * (weights[:, None] / unit), 0.0).trunc()
        whole[name] = r
        squared += r.square().sum(1)
    kept = squared <= bound
    return {
        name: torch.where(kept[:, None], r, 0.0)
        .to(torch.int64)
        .sum(0)
        .reshape(gradients[name].shape[1:])
        for name, r in whole.items()
    }
