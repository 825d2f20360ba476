"""The Rényi accountant: looser than the others, simple, and what most libraries state."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from dptorch.accounting.accountants.protocol import Compositions, PairAccountant, check_delta
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.composition.contour import log_mgf
from dptorch.accounting.events import History
from dptorch.accounting.pairs.discrete_gaussian import DiscretePair
from dptorch.accounting.pairs.sampled import Array, Pair, SampledPair

__all__ = ["RDPAccountant", "renyi_divergences", "renyi_orders"]

_ROUNDING = 1e-15


@dataclass(frozen=True)
class RDPAccountant(PairAccountant):
    """An upper bound on ε from Rényi divergences.

    The orders and the conversion to (ε, δ) are those of Google's `dp-accounting`. The divergences are
    those of the pairs themselves, by quadrature, at fractional orders too, where the bound that
    `dp-accounting` takes is up to a quarter larger. So ε is at most Opacus's, whose orders are among
    these, up to 1e-6 of it.

    Under add/remove the larger divergence is that of `remove` (Mironov, Talwar, Zhang 2019,
    arXiv:1908.10530). Under replace-one it is that of the `replace` pair of
    `dptorch.accounting.pairs.sampled`, which at sample_rate = 1 is the Gaussian's with 2C.

    Its ε cannot go below log(1/δ) / 1023 or so, however large the noise: the largest order is 1024.

    Example:
        >>> from dptorch.accounting import SampledGaussian
        >>> run = [SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)]
        >>> round(RDPAccountant().epsilon(run, 1e-5), 4)
        2.1014
    """

    name: str = "rdp"
    is_upper_bound: bool = True

    def divergences(
        self, history: History, *, adjacency: Adjacency | str = Adjacency.ADD_REMOVE
    ) -> tuple[Array, Array]:
        """([n] orders, [n] Rényi divergences of `history`); inf without noise.

        Raises:
            PrivacyError: an event that it does not cover.
        """
        run = self._reduce(history, adjacency)
        if run.noiseless or run.overflow:
            return renyi_orders(), np.full(renyi_orders().size, np.inf)
        return renyi_orders(), renyi_divergences(run.compositions)

    def _epsilon(self, compositions: Compositions, delta: float) -> float:
        from dp_accounting.rdp import rdp_privacy_accountant as rdp

        divergences = renyi_divergences(compositions)
        return float(rdp.compute_epsilon(renyi_orders(), divergences, delta)[0])

    def best_order(
        self,
        history: History,
        delta: float,
        *,
        adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    ) -> float:
        """The Rényi order that gives `epsilon`; infinite where nothing, or no noise, was released."""
        from dp_accounting.rdp import rdp_privacy_accountant as rdp

        run = self._reduce(history, adjacency)
        if run.noiseless or not run.compositions:
            return math.inf
        divergences = renyi_divergences(run.compositions)
        return float(rdp.compute_epsilon(renyi_orders(), divergences, check_delta(delta))[1])

    def _delta(self, compositions: Compositions, epsilon: float) -> float:
        from dp_accounting.rdp import rdp_privacy_accountant as rdp

        return float(rdp.compute_delta(renyi_orders(), renyi_divergences(compositions), epsilon)[0])


def renyi_divergences(compositions: Compositions) -> Array:
    """Rényi divergences, the largest over the directions, at every one of `renyi_orders`."""
    # The larger of the two at each order bounds both directions, whatever order the conversion takes.
    totals = [np.zeros_like(renyi_orders())]
    for pairs in compositions:
        total = np.zeros_like(renyi_orders())
        for pair in pairs:
            total += pair.steps * _one_step(replace(pair, steps=1))  # type: ignore[type-var]
        totals.append(total)
    return np.max(totals, axis=0)


@lru_cache(maxsize=1)
def renyi_orders() -> Array:
    """The orders α at which divergences are computed, ascending."""
    from dp_accounting.rdp import rdp_privacy_accountant

    return np.asarray(rdp_privacy_accountant.DEFAULT_RDP_ORDERS, float)


@lru_cache(maxsize=1024)
def _one_step(pair: Pair) -> Array:
    """Rényi divergences of one step, at every order.

    Rounding can leave a divergence of 1e-16 below 0, which `dp-accounting` takes for a proof of
    ε = 0 or δ = 0; hence the small surcharge.
    """
    orders = renyi_orders()
    if isinstance(pair, DiscretePair):
        # The bound of dptorch.accounting.pairs.discrete_gaussian holds at integer orders only.
        gaussian = SampledPair("remove", pair.gaussian_noise, pair.sample_rate, 1)
        found = np.where(orders == np.floor(orders), _one_step(gaussian), np.inf)
    else:
        if isinstance(pair, SampledPair) and pair.direction == "add":
            # The divergence of `remove` is the larger (Mironov, Talwar, Zhang 2019, Theorem 5).
            pair = replace(pair, direction="remove")
        # D_α = log E_P[e^{(α-1) L}] / (α - 1), L = log P/Q: the pair's own, not a bound on it.
        found = np.array([log_mgf([pair], a - 1) / (a - 1) for a in orders])
    return np.maximum(found, 0.0) + _ROUNDING
