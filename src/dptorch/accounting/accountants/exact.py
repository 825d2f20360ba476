"""The exact accountant: the composed privacy loss inverted along a saddle-point line."""

from __future__ import annotations

from dataclasses import dataclass

from dptorch.accounting.accountants.protocol import Compositions, PairAccountant
from dptorch.accounting.composition.composed import composed_delta, composed_epsilon

__all__ = ["ExactAccountant"]


@dataclass(frozen=True)
class ExactAccountant(PairAccountant):
    """ε and δ to nine digits nearly everywhere, in milliseconds. For planning and calibration.

    One step and sample_rate = 1 have closed forms (`dominating`); nearly everything else, mixtures
    included, is a contour integral (`contour`; `composition` chooses). Each direction of add/remove
    is composed alone.

    Where one step's loss sits almost wholly at one point (few steps at a rate of 1e-6, say), the
    integral does not settle. Discretised losses are extrapolated there, and log δ is known to 1e-6
    mostly and to 1e-3 at worst.

    `is_upper_bound` is False: the quadrature's error is checked at run time and far below 1e-6 in ε,
    but no theorem certifies its sign. State the number of "pld" where a bound is needed.

    Example:
        >>> from dptorch.accounting import SampledGaussian
        >>> run = [SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)]
        >>> round(ExactAccountant().epsilon(run, 1e-5), 7)
        1.8282367
        >>> round(ExactAccountant().epsilon(run, 1e-5, adjacency="replace-one"), 4)
        2.8434
    """

    name: str = "exact"
    is_upper_bound: bool = False

    def _epsilon(self, compositions: Compositions, delta: float) -> float:
        epsilon = 0.0
        for pairs in compositions:
            epsilon = composed_epsilon(pairs, delta, floor=epsilon)
        return epsilon

    def _delta(self, compositions: Compositions, epsilon: float) -> float:
        delta = 0.0
        for pairs in compositions:
            delta = composed_delta(pairs, epsilon, floor=delta)
        return delta
