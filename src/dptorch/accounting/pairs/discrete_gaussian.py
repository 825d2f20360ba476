"""Rényi divergences of the Poisson-sampled discrete Gaussian, with their proof.

The mechanism. Every record contributes an integer vector of norm at most D; a step draws each record
with probability q, adds up what was drawn, and adds independent draws of the discrete Gaussian
N_Z(0, s^2), whose mass at the integer x is proportional to exp(-x^2 / (2 s^2)). The noise multiplier is
s / D.

In many dimensions this does not reduce to a pair of distributions on a line, as the Gaussian does
(N_Z^d has no rotations), so that accountants which compose privacy losses do not cover it. Rényi
divergences do. Write Q for the law of noise + S and R for that of noise + S + v, S and v integer
vectors with |v| <= D, and P = (1-q) Q + q R.

1. For an integer k > 1: E_Q[(R/Q)^k] <= exp(k (k-1) |v|^2 / (2 s^2)) <= exp(k (k-1) / (2 sigma^2)).
   (Canonne, Kamath, Steinke 2020, arXiv:2004.00010, Proposition 5, coordinate by coordinate: Rényi
   divergences of products add up.) For the Gaussian it holds with equality at |v| = D.
2. The record removed. For an integer a > 1, by the binomial theorem,
   E_Q[(P/Q)^a] = sum_k C(a, k) (1-q)^(a-k) q^k E_Q[(R/Q)^k]. Every term is bounded by that of the
   sampled Gaussian of the same sigma, so the sum is (that sum: Mironov, Talwar, Zhang 2019,
   arXiv:1908.10530, section 3.3).
3. The record added: D_a(Q || P) <= D_a(P || Q), by their Theorem 5, whose condition is that a
   measure-preserving involution exchanges Q and R: here x -> 2 S + v - x, which maps the integers to
   the integers.
4. The other records are drawn at random too: quasi-convexity of Rényi divergences, over their draw.

So at integer orders its divergence is at most that of the sampled Gaussian with the same noise
multiplier and rate. Without sampling, step 1 is all that is needed, also where a record is replaced (D
becomes 2 D). Under sampling and replacement no such proof is known here, and it is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dptorch.accounting.pairs.sampled import Direction

__all__ = ["DiscretePair"]


@dataclass(frozen=True)
class DiscretePair:
    """Neighbouring outputs of the sampled discrete Gaussian: known by bounds on Rényi divergences.

    Attributes:
        direction: as in `SampledPair`; "replace" at sample_rate 1 only.
        noise_multiplier: noise scale over the bound on one contribution, > 0.
        sample_rate: q in (0, 1].
        steps: how often it is composed with itself.
    """

    direction: Direction
    noise_multiplier: float
    sample_rate: float
    steps: int

    @property
    def gaussian_noise(self) -> float:
        """Noise multiplier of the sampled Gaussian whose divergences bound its own."""
        return self.noise_multiplier / (2.0 if self.direction == "replace" else 1.0)

    @property
    def mu(self) -> float | None:
        """None: the pair is no Gaussian."""
        return None

    @property
    def largest_loss(self) -> float:
        """Infinity: the loss is not known to be finite."""
        return math.inf
