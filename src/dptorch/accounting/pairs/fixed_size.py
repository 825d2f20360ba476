"""The dominating pair of fixed-size sampling under replace-one.

In units of C, N(m) = N(m, σ²). One step draws B of N records; x and x' are the record replaced.

*Without replacement.* Pair each sample that holds x with the one that has another record in its
place, given the rest: the outputs are (1-q) N(a) + q N(u) and (1-q) N(a) + q N(v), with q = B/N and
a, u, v within 2 of each other. For a set A with N(u)(A) = Φ(y), Neyman and Pearson give N(v)(A) and
N(a)(A) >= Φ(y - 2/σ) and N(a)(A) <= Φ(y + 2/σ), so that (the rest of the sample only lowers H_α,
which is jointly convex)

    H_α <= H_α((1-q) N(0) + q N(2), N(0))     for α >= 1
    H_α <= H_α(N(0), (1-q) N(0) + q N(2))     for α <= 1

(Balle, Barthe, Gaboardi 2018, arXiv:1807.01647, Theorem 9; Zhu, Dong, Wang 2022, arXiv:2106.08567,
Theorem 11). The two bounds are one profile, whose pair is glued from `remove` and `add`: its loss is
that of `remove` where positive, of `add` where negative, and 0 with what probability is left.
Composing `remove` and `add` each alone would not be sound here (Lebeda et al. 2024,
arXiv:2405.20769): replacement goes both ways at once.

*With replacement.* x is drawn k times with probability p_k (binomial: B trials of 1/N); k copies
move the sum by up to 2k. With q = 1 - p_0, for α >= 1,

    H_α <= Σ_{k>=1} p_k H_α'(N(2k), N(0)),  α' = 1 + (α - 1) / q     (Balle et al., Theorem 10)
        =  Σ_{k>=1} p_k / q · H_α((1-q) N(0) + q N(2k), N(0)),

that is, the pair above with a sensitivity of 2k, where k is drawn given k >= 1 and known to both
sides. For α <= 1 the relation's symmetry gives the reverse, so each k is glued as above.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dptorch.accounting.pairs.sampled import (
    MOST_NODES,
    NEGLIGIBLE,
    Array,
    SampledPair,
    Unsettled,
    amplified_delta,
    normal_masses,
)

__all__ = ["FixedSizePair", "WithReplacementPair"]

_SMALLEST_WEIGHT = 1e-60
_GAUSS_POINTS = 16


class _GluedPair(ABC):
    """`remove` glued to `add` at loss 0, for a random number of copies k known to both sides."""

    noise_multiplier: float
    rate: float

    @abstractmethod
    def _copies(self) -> list[tuple[int, float]]:
        """(k, its probability given the record is drawn), rising."""

    @property
    def largest_loss(self) -> float:
        """Infinity, as the output can show that the record was drawn."""
        return math.inf

    def one_step_delta(self, epsilon: float) -> float:
        """H_{e^ε} of one step, in closed form, for ε >= 0.

        Example:
            >>> pair = FixedSizePair(1.0, rate=0.01, steps=1)
            >>> other = SampledPair("remove", 0.5, 0.01, 1)
            >>> pair.one_step_delta(0.3) == other.one_step_delta(0.3)
            True
        """
        noise, q = self.noise_multiplier, self.rate
        terms = [w * amplified_delta(epsilon, q, 2 * k / noise) for k, w in self._copies()]
        return math.fsum(terms)

    def loss_ends(self, tail: float) -> tuple[float, float]:
        """See `Pair.loss_ends`."""
        high = max(part.loss_ends(tail)[1] for _, part in self._parts(tail))
        return -high, high

    def cells(
        self, interval: float, tail: float, reach: float = math.inf
    ) -> tuple[int, Array, Array]:
        """See `Pair.cells`."""
        last = math.ceil(min(self.loss_ends(tail)[1], reach) / interval)
        p, q = np.zeros(2 * last + 1), np.zeros(2 * last + 1)
        grid = interval * np.arange(last + 1)
        parts = self._parts(tail)
        for weight, part in parts:
            edges = np.concatenate([part.thresholds(grid), [np.inf]])
            base = normal_masses(edges / part.noise_multiplier)
            moved = normal_masses((edges - 1) / part.noise_multiplier)
            hit = (1 - self.rate) * base + self.rate * moved
            # Cell `last` starts at loss 0; the mirrored ones end there.
            below, above = base[::-1], hit[::-1]
            folded = np.concatenate([[below[0] + below[1]], below[2:]])
            p[:last] += weight * folded
            q[:last] += weight * np.concatenate([[above[0] + above[1]], above[2:]])
            p[last:] += weight * hit
            q[last:] += weight * base
            # Both glued parts keep to their own side of 0. P and Q agree on what neither covers.
            atom = weight * max(0.0, 1 - float(hit.sum() + base.sum()))
            p[last] += atom
            q[last] += atom
        # The k that were left out count as of infinite loss, as Q has no mass there.
        p[-1] += max(0.0, 1 - sum(weight for weight, _ in parts))
        return -last, p, q

    def nodes(self, t: float, height: float, tail: float | None) -> tuple[Array, Array]:
        """Gauss-Legendre panels in x on each side of loss 0, and the atom; see `Pair.nodes`."""
        log_masses, losses, atom = [], [], 0.0
        for weight, part in self._parts(tail):
            sigma, start = part.noise_multiplier, float(part.thresholds(np.zeros(1))[0])
            side = 10.0 if tail is None else max(9.5, math.sqrt(-2 * tail) + 5.0)
            end = side * sigma + 1 + (t if tail is None else 0.0)
            # A panel resolves the bell, the loss's bend (analytic within πσ²) and e^{iyL}.
            widest = min(sigma, 2 * sigma**2, 12.0 * sigma**2 / max(height, 1e-300))
            if _GAUSS_POINTS * (end - start) / widest > MOST_NODES:
                raise Unsettled(f"the contour integral does not settle for {self}")
            x, widths = _panels(start, end, widest)
            loss = part.log_ratios(x)[0]
            base = np.log(widths / (sigma * math.sqrt(2 * math.pi))) - 0.5 * (x / sigma) ** 2
            log_masses += [base + loss + math.log(weight), base + math.log(weight)]
            losses += [loss, -loss]
            edges = np.array([start, np.inf])
            outside = float(normal_masses(edges / sigma)[0])
            moved = float(normal_masses((edges - 1) / sigma)[0])
            atom += weight * (1 - (2 - self.rate) * outside - self.rate * moved)
        if atom > 0:
            log_masses.append(np.array([math.log(atom)]))
            losses.append(np.zeros(1))
        masses, points = np.concatenate(log_masses), np.concatenate(losses)
        weights = masses + np.maximum(t * points, 0.0)
        keep = weights > max(float(weights.max()), 0.0) - NEGLIGIBLE
        return masses[keep], points[keep]

    def _parts(self, tail: float | None = None) -> list[tuple[float, SampledPair]]:
        """(probability, `remove` in units of 2k) by k, without e^`tail` of the largest k."""
        copies, noise = self._copies(), self.noise_multiplier
        lost = 0.0 if tail is None else math.exp(tail)
        while len(copies) > 1 and (lost := lost - copies[-1][1]) > 0:
            copies = copies[:-1]
        return [
            (weight, SampledPair("remove", noise / (2 * k), self.rate, 1)) for k, weight in copies
        ]


@dataclass(frozen=True)
class FixedSizePair(_GluedPair):
    """One step without replacement.

    Attributes:
        noise_multiplier: σ > 0.
        rate: q = B/N.
        steps: how often the pair is composed with itself.
    """

    noise_multiplier: float
    rate: float
    steps: int

    @property
    def mu(self) -> float | None:
        """2/σ where every record is in every batch, else None: the pair is no Gaussian."""
        return 2 / self.noise_multiplier if self.rate == 1 else None

    def _copies(self) -> list[tuple[int, float]]:
        return [(1, 1.0)]


@dataclass(frozen=True)
class WithReplacementPair(_GluedPair):
    """One step with replacement.

    Attributes:
        noise_multiplier: σ > 0.
        batch_size: B, draws of a step.
        sample_size: N.
        steps: how often the pair is composed with itself.
    """

    noise_multiplier: float
    batch_size: int
    sample_size: int
    steps: int

    @property
    def rate(self) -> float:  # type: ignore[override]
        """q: the probability that a step draws the record at all."""
        if self.sample_size == 1:
            return 1.0
        return -math.expm1(self.batch_size * math.log1p(-1 / self.sample_size))

    @property
    def mu(self) -> float | None:
        """None: the pair is no Gaussian, unless there is one record, which every draw takes."""
        return 2 * self.batch_size / self.noise_multiplier if self.sample_size == 1 else None

    def _copies(self) -> list[tuple[int, float]]:
        return _copies(self.batch_size, self.sample_size)


@lru_cache(maxsize=64)
def _copies(draws: int, records: int) -> list[tuple[int, float]]:
    """P(k copies | at least one) of a binomial count, without the k of a probability below 1e-60."""
    from scipy.stats import binom

    if records == 1:
        return [(draws, 1.0)]
    middle, spread = draws / records, math.sqrt(draws / records)
    most = min(draws, math.ceil(middle + 30 * spread + 120))
    k = np.arange(1, most + 1)
    log_weights = binom.logpmf(k, draws, 1 / records) - binom.logsf(0, draws, 1 / records)
    large = log_weights > math.log(_SMALLEST_WEIGHT)
    return list(zip(k[large].tolist(), np.exp(log_weights[large]).tolist(), strict=True))


def _panels(start: float, end: float, widest: float) -> tuple[Array, Array]:
    """Nodes and weights of Gauss-Legendre panels no wider than `widest` on [start, end]."""
    points, weights = np.polynomial.legendre.leggauss(_GAUSS_POINTS)
    count = max(1, math.ceil((end - start) / widest))
    half = (end - start) / (2 * count)
    middles = start + half * (2 * np.arange(count) + 1)
    x = (middles[:, None] + half * points).ravel()
    return x, np.tile(half * weights, count)
