"""From a noisy sum to numbers that people read, with the size of the noise in each.

All of it is post-processing: nothing here sees the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dptorch.accounting.toeplitz import inverse_square_root
from dptorch.statistics.quantities import (
    Floats,
    Numeric,
    Quantity,
    layout,
    prefix_norm,
    prefix_root,
)

__all__ = ["NumericSummary", "Summary", "summarise"]


@dataclass(frozen=True)
class NumericSummary:
    """Of a column of numbers. A "±" is one standard deviation of the noise.

    Attributes:
        mean, mean_noise: of what is there, clipped to the bounds.
        deviation, deviation_noise: standard deviation; the noise to first order.
        missing: share of the units whose value is missing; None where none may be.
        quantiles: by level, within a bin's width and the noise; empty without a histogram.
        edges, counts: histogram: noisy counts, which may be negative.
        count_noise: of each count, at most.
        share_noise: of the share of values below any edge, at most: a quantile of level q is one of a
            level within about twice that of q.
    """

    mean: float
    mean_noise: float
    deviation: float
    deviation_noise: float
    missing: float | None = None
    quantiles: Mapping[str, float] = field(default_factory=dict)
    edges: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()
    count_noise: float = 0.0
    share_noise: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [
            f"mean {self.mean:.6g} ± {self.mean_noise:.2g}",
            f"deviation {self.deviation:.6g} ± {self.deviation_noise:.2g}",
        ]
        if self.quantiles:
            levels = [
                f"{100 * float(level):g}% {value:.4g}" for level, value in self.quantiles.items()
            ]
            parts.append(f"quantiles {' '.join(levels)} (levels ± {100 * self.share_noise:.2g}%)")
        if self.missing is not None:
            parts.append(f"missing {self.missing:.1%}")
        return ", ".join(parts)


@dataclass(frozen=True)
class ChoiceSummary:
    """Of a column with a public list of values.

    Attributes:
        counts: noisy, by value; they may be negative.
        count_noise: standard deviation of the noise of each.
    """

    counts: Mapping[str, float]
    count_noise: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        found = ", ".join(f"{value}: {count:.1f}" for value, count in self.counts.items())
        return f"{found} (± {self.count_noise:.2g})"


Summary = NumericSummary | ChoiceSummary


def summarise(
    quantities: Sequence[Quantity],
    sums: Floats,
    *,
    noise: float,
    units: int,
    quantiles: Sequence[float],
) -> dict[str, Summary]:
    """Summaries by column.

    Args:
        quantities: what was asked for.
        sums: noisy, [coordinates], as `Numeric.rows` and `Choice.rows` count.
        noise: standard deviation of the noise in each coordinate.
        units: how many contributed.
        quantiles: levels.
    """
    of: dict[str, dict[str, Floats]] = {}
    for block in layout(quantities):
        of.setdefault(block.name, {})[block.kind] = sums[block.start : block.stop]
    return {
        q.name: (
            _numeric(q, of[q.name], noise, units, quantiles)
            if isinstance(q, Numeric)
            else ChoiceSummary(
                dict(zip(q.values, of[q.name]["histogram"].tolist(), strict=True)), noise
            )
        )
        for q in quantities
    }


def _numeric(
    asked: Numeric,
    of: Mapping[str, Floats],
    noise: float,
    units: int,
    quantiles: Sequence[float],
) -> NumericSummary:
    low, high = asked.bounds
    there = float(np.clip(of["present"][0], 1.0, units)) if asked.missing else float(units)
    t = float(np.clip(of["mean"][0] / there, -1.0, 1.0))
    square = float(np.clip((of["square"][0] / there + 1) / 2, 0.0, 1.0))
    variance = max(0.0, square - t * t)
    half = (high - low) / 2
    relative = noise / there
    # To first order: that of the mean has the count's noise too, that of a variance both of its parts.
    of_mean = relative * math.hypot(1.0, t if asked.missing else 0.0)
    of_variance = relative * math.hypot(
        0.5, 2 * t, (abs(square - 0.5) + 2 * t * t) if asked.missing else 0.0
    )
    deviation = math.sqrt(variance)
    found: dict[str, Any] = {}
    if asked.bins:
        root, norm = prefix_root(asked.bins), prefix_norm(asked.bins)
        sums = of["prefix"] * norm
        below = root @ sums
        levels = {str(level): _quantile(asked.edges, below / there, level) for level in quantiles}
        found = {
            "quantiles": levels,
            "edges": tuple(asked.edges.tolist()),
            "counts": tuple(np.diff(below, prepend=0.0).tolist()),
            "count_noise": noise * norm * float(np.linalg.norm(inverse_square_root(asked.bins))),
            "share_noise": noise / there * norm**2,
        }
    return NumericSummary(
        mean=low + (t + 1) * half,
        mean_noise=half * of_mean,
        deviation=half * deviation,
        deviation_noise=half * min(math.sqrt(of_variance), of_variance / max(2 * deviation, 1e-9)),
        missing=1 - there / units if asked.missing else None,
        **found,
    )


def _quantile(edges: Floats, below: Floats, level: float) -> float:
    """Where the share below reaches `level`: between two bins' edges along a straight line.

    Args:
        edges: of the bins.
        below: share of the values up to the upper edge of each bin, with noise.
        level: of the quantile.
    """
    share = np.concatenate([[0.0], below])
    # Noise makes it fall in places. The mean of the two nearest curves that do not fall:
    rising = (np.maximum.accumulate(share) + np.minimum.accumulate(share[::-1])[::-1]) / 2
    rising = np.clip(rising, 0.0, 1.0)
    rising[-1] = max(float(rising[-1]), level)
    place = int(np.searchsorted(rising, level, "left"))
    if place == 0:
        return float(edges[0])
    below, above = rising[place - 1], rising[place]
    part = 1.0 if above <= below else (level - below) / (above - below)
    return float(edges[place - 1] + part * (edges[place] - edges[place - 1]))
