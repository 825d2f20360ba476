"""The Rényi accountant: loose, simple, and known to everybody."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dptorch.accounting.accountants.protocol import (
    check_delta,
    check_epsilon,
    covered,
    without_noise,
)
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.contour import log_mgf
from dptorch.accounting.dominating import Array
from dptorch.accounting.events import Event, History, SampledGaussian

__all__ = ["RDPAccountant"]

_ROUNDING = 1e-15


@dataclass(frozen=True)
class RDPAccountant:
    """An upper bound on ε from Rényi divergences, through Google's `dp-accounting`.

    Its orders and its conversion to (ε, δ) are `dp-accounting`'s; so are the divergences of the
    sampled Gaussian under add/remove (Mironov, Talwar, Zhang 2019, arXiv:1908.10530). Under
    replace-one `dp-accounting` covers no Poisson sampling, and without sampling forgets that the
    sum moves by 2C; here the divergence is that of the `replace` pair of
    `dptorch.accounting.dominating`, which at sample_rate = 1 is the Gaussian's with 2C.

    Its ε cannot go below log(1/δ) / 1023 or so, however large the noise: the largest order is 1024.

    Example:
        >>> run = [SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)]
        >>> round(RDPAccountant().epsilon(run, 1e-5), 4)
        2.1014
    """

    name: str = "rdp"
    is_upper_bound: bool = True

    def covers(self, event: Event) -> bool:
        """Whether `event` is a Poisson-sampled Gaussian."""
        return isinstance(event, SampledGaussian)

    def epsilon(
        self,
        history: History,
        delta: float,
        *,
        adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    ) -> float:
        """ε of `history` at `delta`; see `Accountant.epsilon`."""
        from dp_accounting.rdp import rdp_privacy_accountant as rdp

        delta, relation = check_delta(delta), Adjacency.of(adjacency)
        events = covered(self, history)
        if not events:
            return 0.0
        if without_noise(events):
            return math.inf
        orders, divergences = _divergences(events, relation)
        return float(rdp.compute_epsilon(orders, divergences, delta)[0])

    def delta(
        self,
        history: History,
        epsilon: float,
        *,
        adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
    ) -> float:
        """δ of `history` at `epsilon`; see `Accountant.delta`."""
        from dp_accounting.rdp import rdp_privacy_accountant as rdp

        epsilon, relation = check_epsilon(epsilon), Adjacency.of(adjacency)
        events = covered(self, history)
        if not events:
            return 0.0
        if without_noise(events):
            return 1.0
        orders, divergences = _divergences(events, relation)
        return float(rdp.compute_delta(orders, divergences, epsilon)[0])


def _divergences(events: list[SampledGaussian], relation: Adjacency) -> tuple[Array, Array]:
    orders = _orders()
    total = np.zeros_like(orders)
    for event in events:
        total += event.steps * _one_step(event.noise_multiplier, event.sample_rate, relation)
    return orders, total


@lru_cache(maxsize=1)
def _orders() -> Array:
    from dp_accounting.rdp import rdp_privacy_accountant

    return np.asarray(rdp_privacy_accountant.DEFAULT_RDP_ORDERS, float)


@lru_cache(maxsize=1024)
def _one_step(sigma: float, rate: float, relation: Adjacency) -> Array:
    """Rényi divergences of one step, at every order.

    Rounding can leave a divergence of 1e-16 below 0, which `dp-accounting` takes for a proof of
    ε = 0 or δ = 0; hence the small surcharge.
    """
    if relation is Adjacency.REPLACE_ONE:
        step = SampledGaussian(sigma, rate, 1)
        found = np.array([log_mgf([step], "replace", a - 1) / (a - 1) for a in _orders()])
    else:
        found = _dp_accounting_divergences(sigma, rate)
    return np.maximum(found, 0.0) + _ROUNDING


def _dp_accounting_divergences(sigma: float, rate: float) -> Array:
    from absl import logging
    from dp_accounting import dp_event
    from dp_accounting.rdp import rdp_privacy_accountant

    accountant = rdp_privacy_accountant.RdpAccountant(_orders())
    verbosity = logging.get_verbosity()
    # An order whose series does not converge counts as infinite, which keeps the bound.
    logging.set_verbosity(logging.ERROR)
    try:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)))
    finally:
        logging.set_verbosity(verbosity)
    return np.asarray(accountant.rdp, float)
