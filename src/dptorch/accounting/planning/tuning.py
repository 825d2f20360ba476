"""The privacy cost of hyper-parameter tuning: several runs, of which the best is published.

Choosing the run to publish by a score on private data releases more than the published run did. If
the number of runs is itself random and secret, the best of many costs little more than one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dptorch.accounting.accountants import registry
from dptorch.accounting.accountants.protocol import check_delta
from dptorch.accounting.accountants.rdp import RDPAccountant
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.events import History
from dptorch.accounting.pairs.sampled import Array
from dptorch.errors import ConfigurationError, PrivacyError, one_of

__all__ = ["RUN_LAWS", "RunLaw", "tuned_epsilon"]

#: Laws of the random number of runs, of which the best is published.
RUN_LAWS = ("logarithmic", "geometric", "poisson", "fixed")
_SHAPES = {"logarithmic": 0.0, "geometric": 1.0}


@dataclass(frozen=True)
class RunLaw:
    """How the number of runs K is drawn, before any of them.

    Attributes:
        name: "logarithmic", "geometric" (both truncated negative binomials, K >= 1), "poisson"
            (K = 0 possible: then publish a fixed model), or "fixed" (K is `mean_runs`; every run
            counts in full).
        mean_runs: E[K], above 1 (for "poisson", above 0).

    Raises:
        ConfigurationError: an unknown name, or a mean that its law cannot have.

    Example:
        >>> law = RunLaw("geometric", mean_runs=20)
        >>> round(law.success, 6)
        0.05
        >>> law.draw(np.random.default_rng(0)) >= 1
        True
    """

    name: str
    mean_runs: float

    def __post_init__(self) -> None:
        one_of("run law", self.name, RUN_LAWS)
        least = 0 if self.name == "poisson" else 1
        mean = self.mean_runs
        whole = self.name != "fixed" or float(mean).is_integer()
        fits = mean > least or (self.name == "fixed" and mean == 1)
        if isinstance(mean, bool) or not (math.isfinite(mean) and fits and whole):
            raise ConfigurationError(
                f"mean_runs={mean!r} does not fit a {self.name} number of runs: it must be finite "
                f"and above {least}{', a whole number' if self.name == 'fixed' else ''}."
            )

    @property
    def is_secret(self) -> bool:
        """Whether the cost counts on nobody being told K."""
        return self.name != "fixed"

    @cached_property
    def success(self) -> float:
        """γ of the truncated negative binomial with this mean."""
        from scipy.optimize import brentq

        if self.name == "geometric":
            return 1 / self.mean_runs
        # The logarithmic law's mean (1/γ - 1) / log(1/γ) rises with g = log(1/γ).
        g = float(brentq(lambda g: math.expm1(g) / g - self.mean_runs, 1e-12, 100.0))
        return math.exp(-g)

    def draw(self, rng: np.random.Generator) -> int:
        """Draw K. Keep the generator's seed secret: whoever knows K knows more than is accounted."""
        if self.name == "fixed":
            return int(self.mean_runs)
        if self.name == "poisson":
            return int(rng.poisson(self.mean_runs))
        if self.name == "geometric":
            return int(rng.geometric(self.success))
        return int(rng.logseries(1 - self.success))


def tuned_epsilon(
    history: History,
    delta: float,
    law: RunLaw,
    *,
    adjacency: Adjacency | str = Adjacency.ADD_REMOVE,
) -> float:
    """Return the ε of publishing the best of K runs of `history`, where `law` draws K.

    The runs may differ in hyper-parameters if `history` is the costliest of them; the score may be
    any function of a run's output and the private data as long as that, too, is within `history`.
    Papernot and Steinke 2022 (arXiv:2110.03620), Theorems 2 (negative binomial) and 6 (Poisson), in
    Rényi DP; for "fixed", all runs are composed by the `pld` accountant. The geometric law with pure
    DP is Liu and Talwar's (2019, arXiv:1811.07971).

    Guarantees:
        An upper bound, by `test_no_enumerated_mechanism_exceeds_the_bound` and
        `test_no_enumerated_mechanism_exceeds_the_bound_of_a_poisson_number` of
        tests/accounting/planning/test_tuning.py.

    Raises:
        ConfigurationError: delta outside (0, 1).
        PrivacyError: an event that the `rdp` accountant does not cover.

    Example:
        >>> from dptorch.accounting import SampledGaussian
        >>> run = [SampledGaussian(noise_multiplier=1.0, sample_rate=0.01, steps=1000)]
        >>> for name in RUN_LAWS:
        ...     print(name, round(tuned_epsilon(run, 1e-5, RunLaw(name, 10)), 2))
        logarithmic 3.52
        geometric 4.1
        poisson 3.55
        fixed 6.19
    """
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    check_delta(delta)
    if law.name == "fixed":
        everything = [event for event in history for _ in range(int(law.mean_runs))]
        return registry.get_accountant("pld").epsilon(everything, delta, adjacency=adjacency)
    orders, one = RDPAccountant().divergences(history, adjacency=adjacency)
    if not np.isfinite(one).any():
        if any(getattr(event, "overflow", 0.0) for event in history):
            raise PrivacyError(
                "truncated Poisson sampling has no Rényi divergence, in which the cost of tuning is "
                "known. Use plain Poisson sampling."
            )
        return math.inf
    if law.name == "poisson":
        total = _poisson(history, orders, one, law.mean_runs, adjacency)
    else:
        total = _negative_binomial(orders, one, law)
    kept = np.isfinite(total)
    if not kept.any():
        return math.inf
    return float(rdp.compute_epsilon(orders[kept], total[kept], delta)[0])


def _negative_binomial(orders: Array, one: Array, law: RunLaw) -> Array:
    """Theorem 2: at order λ, with any second order λ' for what the selection adds."""
    weight = 1 + _SHAPES[law.name]
    added = weight * ((1 - 1 / orders) * one + math.log(1 / law.success) / orders)
    total: Array = one + added.min() + math.log(law.mean_runs) / (orders - 1)
    return total


def _poisson(
    history: History, orders: Array, one: Array, mean: float, adjacency: Adjacency | str
) -> Array:
    """Theorem 6: δ' is a run's δ at ε' = log(1 + 1/(λ - 1)).

    The theorem holds with any (ε', δ') that a run satisfies. The `pld` accountant's δ' is far below
    the one that follows from Rényi divergences, which `dp-accounting` takes: hence a smaller ε here.
    """
    pld = registry.get_accountant("pld")
    total = np.full(orders.size, np.inf)
    # A hundredth of the orders' range loses little: the bound is flat around its best.
    for k in np.flatnonzero((orders >= 1.5) & np.isfinite(one))[::3]:
        order = float(orders[k])
        outside = pld.delta(history, math.log1p(1 / (order - 1)), adjacency=adjacency)
        total[k] = one[k] + mean * outside + max(0.0, math.log(mean)) / (order - 1)
    return total
