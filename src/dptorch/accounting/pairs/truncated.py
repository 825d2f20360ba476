"""The dominating pair of Poisson sampling whose batches are cut to a capacity B.

Let S be the records drawn besides x, of whom nothing depends on x. Show |S| >= B or not:

* |S| < B: x never costs another record its place. The pair is that of Poisson sampling at rate q.
* |S| >= B: the batch is T and one more, for a random T of B - 1 records of S. Without x that one is
  some y of S. With x it is x with probability q B / (|S| + 1) and y otherwise, a change of at most 2C:
  the pair of Poisson sampling at a rate below q with half the noise. Under replace-one, x and its
  replacement lie within 2C of y and of each other, and the same is true.

Both are in `SampledPair`, and at the full rate q the second costs more than the first. So the cost
only grows with P(|S| >= B), and a public upper bound on the number of records will do. (Chua et al.
2025, arXiv:2508.15089, take the mean of q B / (|S| + 1) instead, which is a little less and needs the
number itself.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dptorch.accounting.pairs.sampled import NEGLIGIBLE, Array, Direction, SampledPair

__all__ = ["TruncatedPair"]


@dataclass(frozen=True)
class TruncatedPair:
    """The dominating pair of truncated Poisson sampling, as the module describes it.

    Attributes:
        direction, noise_multiplier, sample_rate, steps: as of `SampledPair`.
        cut: probability that the other records fill the batch: P(|S| >= B).
    """

    direction: Direction
    noise_multiplier: float
    sample_rate: float
    cut: float
    steps: int

    @property
    def mu(self) -> float | None:
        """None: the pair is no Gaussian."""
        return None

    @cached_property
    def _parts(self) -> tuple[tuple[float, SampledPair], ...]:
        whole = SampledPair(self.direction, self.noise_multiplier, self.sample_rate, 1)
        full = SampledPair(self.direction, self.noise_multiplier / 2, self.sample_rate, 1)
        return tuple((w, part) for w, part in ((1 - self.cut, whole), (self.cut, full)) if w > 0)

    @property
    def largest_loss(self) -> float:
        """As of Poisson sampling: it does not depend on the noise."""
        return self._parts[0][1].largest_loss

    def one_step_delta(self, epsilon: float) -> float:
        """See `Pair.one_step_delta`."""
        return math.fsum(weight * part.one_step_delta(epsilon) for weight, part in self._parts)

    def loss_ends(self, tail: float) -> tuple[float, float]:
        """See `Pair.loss_ends`."""
        # A part may lose what is left of the tail after its own weight.
        ends = [
            part.loss_ends(min(tail - math.log(weight), -1.0))
            for weight, part in self._parts
            if math.log(weight) > tail
        ]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def nodes(self, t: float, height: float, tail: float | None) -> tuple[Array, Array]:
        """See `Pair.nodes`."""
        found = []
        for weight, part in self._parts:
            log_weight = math.log(weight)
            if tail is not None and log_weight <= tail:
                continue
            rest = None if tail is None else min(tail - log_weight, -1.0)
            log_masses, losses = part.nodes(t, height, rest)
            found.append((log_masses + log_weight, losses))
        masses, losses = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        weights = masses + np.maximum(t * losses, 0.0)
        keep = weights > max(float(weights.max()), 0.0) - NEGLIGIBLE
        return masses[keep], losses[keep]

    def cells(
        self, interval: float, tail: float, reach: float = math.inf
    ) -> tuple[int, Array, Array]:
        """See `Pair.cells`."""
        # One grid for both parts, so that each keeps its masses under P and Q: the ends of the wider.
        ends = self.loss_ends(tail)
        parts = [(w, part.cells(interval, tail, reach, ends)) for w, part in self._parts]
        p = sum(weight * cells[1] for weight, cells in parts)
        q = sum(weight * cells[2] for weight, cells in parts)
        return parts[0][1][0], np.asarray(p), np.asarray(q)
