"""The dominating pair of random allocation: one record in one random step of t.

Given everything else, an epoch's t noisy sums differ, record in against record out, as (in units of
C, and for steps that depend on earlier outputs as well: Feldman and Shenfeld 2025,
arXiv:2502.08202; Chua et al. 2024, arXiv:2412.16802)

    P = 1/t Σ_i N(e_i, σ² I)      Q = N(0, σ² I)      on R^t,

`remove` being (P, Q) and `add` (Q, P). Under Q, dP/dQ = W = (Y_1 + ... + Y_t) / t with independent
lognormal Y_i of mean 1, so that H_α(P, Q) = E[(W - α)_+] and H_α(Q, P) = E[(1 - αW)_+]. Both are
expectations of convex functions of each Y_i, also after composition, where W is a product over
epochs. Replacing Y by any Ỹ of the same mean that is *larger in convex order* therefore gives an
upper bound. Two such replacements make the computation finite: each Y is split between the two
neighbouring points of a linear grid, keeping its mean, and Σ Ỹ_i is composed by FFT; then each loss
log W is split between neighbouring points of the loss grid, keeping P and Q (`discretised`:
connect the dots). What is cut off counts as an infinite loss.

Several selections: choosing k of t steps is choosing one of ⌊t/k⌋ in each of k blocks that are
themselves drawn at random; showing the blocks gives k epochs of one in ⌊t/k⌋ (the bound that
Feldman and Shenfeld state).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from dptorch.accounting.pairs.discretised import connect_the_dots
from dptorch.accounting.pairs.sampled import NEGLIGIBLE, Array, normal_masses
from dptorch.errors import ConfigurationError

__all__ = ["AllocationPair"]

_FEWEST, _MOST = 2**14, 2**21  # points of the grid of one Y
_LONGEST_SUM = 2**24  # points of the grid of their sum
_SPACING = 0.02  # of Y's standard deviation: the split then adds 1e-4 to its variance
_FINE = 2.0**-12  # loss interval of the uncertified look-ahead
# Orders of the Chernoff bound, over the largest Y; e^60 is far from overflow.
_ORDERS = np.geomspace(0.1, 60.0, 12)
_USUAL_TAIL = -50.0
_EXCESS_TAIL = 18.0  # a negligible tail is e^-28 of δ; e^-10 will do, for a grid half as long


@dataclass(frozen=True)
class AllocationPair:
    """The dominating pair of random allocation, as the module describes it.

    Attributes:
        direction: "remove" or "add".
        noise_multiplier: σ > 0.
        choices: t, the steps that one record's step is drawn from.
        steps: how often the pair is composed with itself: epochs times selections.
    """

    direction: Literal["remove", "add"]
    noise_multiplier: float
    choices: int
    steps: int

    @property
    def mu(self) -> float | None:
        """1/σ where there is one step to choose, else None: the pair is no Gaussian."""
        return 1 / self.noise_multiplier if self.choices == 1 else None

    @property
    def largest_loss(self) -> float:
        """Infinity: the loss is not known to be finite."""
        return math.inf

    def one_step_delta(self, epsilon: float) -> float:
        """H_{e^ε} of one epoch, from a fine grid: there is no closed form."""
        masses, losses, infinite = _look_ahead(self, _USUAL_TAIL)
        above = losses > epsilon
        return infinite + float(masses[above] @ -np.expm1(epsilon - losses[above]))

    def loss_ends(self, tail: float) -> tuple[float, float]:
        """See `Pair.loss_ends`."""
        masses, losses, _ = _look_ahead(self, tail)
        kept = losses[masses > 0]
        return float(kept[0]), float(kept[-1])

    def nodes(self, t: float, height: float, tail: float | None) -> tuple[Array, Array]:
        """Return the points of a fine loss grid. It is accurate enough to find a tilt."""
        masses, losses, _ = _look_ahead(self, _USUAL_TAIL if tail is None else tail)
        with np.errstate(divide="ignore"):
            log_masses = np.log(masses)
        weights = log_masses + np.maximum(t * losses, 0.0)
        keep = weights > max(float(weights.max()), 0.0) - NEGLIGIBLE
        return log_masses[keep], losses[keep]

    def cells(
        self, interval: float, tail: float, reach: float = math.inf
    ) -> tuple[int, Array, Array]:
        """See `Pair.cells`. All of its grid is kept, whatever `reach`."""
        allowed = min(tail + _EXCESS_TAIL, -10.0)
        losses, p, infinite = _epoch(self.direction, self.noise_multiplier, self.choices, allowed)
        index = np.floor(losses / interval).astype(np.int64)
        first, size = int(index[0]), int(index[-1] - index[0]) + 2
        p_cells = np.bincount(index - first, p, size)
        # q = p e^{-loss}, taken relative to the cell's start so that nothing overflows.
        q_cells = np.bincount(index - first, p * np.exp(index * interval - losses), size)
        q_cells *= np.exp(-interval * (first + np.arange(size)))
        p_cells[-1] += infinite
        return first, p_cells, q_cells


@lru_cache(maxsize=16)
def _look_ahead(pair: AllocationPair, tail: float) -> tuple[Array, Array, float]:
    """([n] masses, [n] losses, infinite mass) of one epoch on a fine grid."""
    part = connect_the_dots(replace(pair, steps=1), _FINE, tail)
    return part.masses, _FINE * (part.lowest + np.arange(part.masses.size)), part.infinite


@lru_cache(maxsize=8)
def _epoch(
    direction: Literal["remove", "add"], sigma: float, choices: int, tail: float
) -> tuple[Array, Array, float]:
    """The loss of one epoch under the first distribution of the pair.

    Returns:
        losses: [n] rising.
        masses: [n] their probabilities.
        infinite: probability that counts as of infinite loss.
    """
    spacing, biased, plain, lost = _sum_of_lognormals(sigma, choices, tail)
    ratios = np.log(spacing / choices * np.arange(1, biased.size))
    masses = biased[1:] if direction == "remove" else plain[:0:-1]
    losses = ratios if direction == "remove" else -ratios[::-1]
    # A sum of 0 has no density under P: an infinite loss for `add`.
    infinite = lost + (0.0 if direction == "remove" else float(plain[0]))
    some = np.flatnonzero(masses)
    kept = slice(some[0], some[-1] + 1)
    return losses[kept], masses[kept], infinite


@lru_cache(maxsize=4)
def _sum_of_lognormals(
    sigma: float, choices: int, tail: float
) -> tuple[float, Array, Array, float]:
    """Σ Ỹ_i on the multiples of a spacing: (spacing, [n] P's masses, [n] Q's, what either lacks)."""
    from scipy import fft
    from scipy.special import ndtr

    # Beyond `highest`, which P or Q reaches with probability e^tail / t, a Y is lost.
    # P(Z > r) <= e^(-r²/2) gives r. Under P the record's step has Z + 1/σ, hence the plus.
    reach = math.sqrt(-2 * (tail - math.log(choices)))
    highest = math.exp(0.5 / sigma**2 + reach / sigma)
    lost = 2 * choices * float(ndtr(-reach))  # of t steps, under P or Q
    deviation = math.sqrt(math.expm1(min(1 / sigma**2, 100.0)))
    count = min(max(math.ceil(highest / (_SPACING * deviation)), _FEWEST), _MOST)
    spacing = highest / count
    plain, biased = _split_lognormal(sigma, spacing, count)
    # So is a sum beyond `end`, of which a biased one is the larger: by Chernoff, P(S > end) <=
    # E[e^{order S}] e^{-order end}, which is e^tail at the end taken.
    points = spacing * np.arange(count + 1)
    ends = [choices * highest]
    for order in _ORDERS / highest:
        weights = np.exp(order * points)
        log_moment = (choices - 1) * math.log(plain @ weights) + math.log(biased @ weights)
        ends.append((log_moment - tail) / order)
    lost += math.exp(tail)
    size = fft.next_fast_len(math.ceil(min(ends) / spacing) + 2, real=True)
    if size > _LONGEST_SUM:
        raise ConfigurationError(
            f"a random allocation to {choices} steps at noise_multiplier={sigma} is too long to "
            "compose. Account for it as Poisson sampling is, by using a Poisson sampler."
        )

    spectrum = fft.rfft(plain, size)
    rest = spectrum ** (choices - 1)
    masses = []
    for last in (fft.rfft(biased, size), spectrum):
        found = fft.irfft(rest * last, size)
        # Negative masses show the size of the transform's rounding; what is no larger is lost.
        noise = 2 * max(-float(found.min()), 1e-19)
        small = found < noise
        lost += noise * size
        masses.append(np.where(small, 0.0, found))
    return spacing, masses[0], masses[1], lost


def _split_lognormal(sigma: float, spacing: float, count: int) -> tuple[Array, Array]:
    """Y = e^{Z/σ - 1/(2σ²)} split between the grid points 0..count, keeping its mean in each cell.

    Returns:
        plain: [count + 1] probabilities, without what lies above the grid.
        biased: [count + 1] the same times the grid's values: the law of the step that the record is in.
    """
    with np.errstate(divide="ignore"):
        z = sigma * np.log(spacing * np.arange(count + 1)) + 0.5 / sigma
    mass = normal_masses(z)
    # E[Y; cell] is the mass of the cell for a normal moved by 1/σ.
    mean = normal_masses(z - 1 / sigma)
    upper = np.clip(mean / spacing - np.arange(count) * mass, 0.0, mass)
    plain = np.zeros(count + 1)
    plain[:-1] += mass - upper
    plain[1:] += upper
    return plain, plain * spacing * np.arange(count + 1)
