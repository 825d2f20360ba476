"""The accountant of Gopi, Lee and Wutschitz, through the optional package `prv-accountant`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from dptorch.accounting.accountants.protocol import Compositions, PairAccountant
from dptorch.accounting.composition.contour import log_mgf
from dptorch.accounting.pairs.sampled import Array, Pair, SampledPair
from dptorch.errors import ConfigurationError

__all__ = ["PRVAccountant"]


@dataclass(frozen=True)
class PRVAccountant(PairAccountant):
    """The upper end of the interval of privacy random variables (arXiv:2106.02848, Theorem 5.5).

    The package composes; the privacy losses given to it are those of `dominating`, so that `add`
    and `replace` are covered, which the package's own sampled Gaussian leaves out.

    Attributes:
        eps_error: half the width of the interval, in ε.
        delta_error_ratio: the interval's error in δ, relative to δ.
    """

    eps_error: float = 0.01
    delta_error_ratio: float = 1e-3
    name: str = "prv"
    is_upper_bound: bool = True

    def _epsilon(self, compositions: Compositions, delta: float) -> float:
        """Upper bound on ε.

        Raises:
            ConfigurationError: `prv-accountant` is not installed, or δ is below what its floating
                point can resolve.
        """
        return max(self.interval(pairs, delta)[2] for pairs in compositions)

    def interval(self, pairs: tuple[Pair, ...], delta: float) -> tuple[float, float, float]:
        """(lower bound, estimate, upper bound) of ε in one direction, none below 0."""
        composed = _composed(pairs, self.eps_error, delta * self.delta_error_ratio)
        try:
            bounds = composed.compute_epsilon(delta, delta * self.delta_error_ratio, self.eps_error)
        except (RuntimeError, ValueError) as problem:
            # The estimate of δ at ε = 0 is below δ already,
            # and ε is known to half the interval's width.
            if "Cannot compute epsilon" in str(problem):
                return 0.0, 0.0, self.eps_error
            raise ConfigurationError(
                f"accountant 'prv' cannot resolve delta={delta}: {problem} Use accountant='pld'."
            ) from problem
        lower, estimate, upper = (max(0.0, float(value)) for value in bounds)
        return lower, estimate, upper

    def _delta(self, compositions: Compositions, epsilon: float) -> float:
        """Upper bound on δ; its error in δ is taken relative to 1e-6."""
        error = 1e-6 * self.delta_error_ratio
        worst = 0.0
        for pairs in compositions:
            composed = _composed(pairs, self.eps_error, error)
            worst = max(worst, composed.compute_delta_estimate(epsilon - self.eps_error) + error)
        return min(1.0, float(worst))


@lru_cache(maxsize=8)
def _composed(pairs: tuple[Pair, ...], eps_error: float, delta_error: float) -> Any:
    try:
        from prv_accountant import PRVAccountant as Package
        from prv_accountant.privacy_random_variables import PrivacyRandomVariable
    except ImportError as problem:
        raise ConfigurationError(
            "accountant='prv' needs the package prv-accountant, which is not installed. "
            "Run: pip install prv-accountant, or use accountant='pld'."
        ) from problem

    class Loss(PrivacyRandomVariable):  # type: ignore[misc]
        """The privacy loss of one step, with the methods that the package calls: `cdf` and `rdp`."""

        def __init__(self, pair: SampledPair) -> None:
            self.pair = replace(pair, steps=1)

        def cdf(self, t: Any) -> Array:
            from scipy.special import ndtr

            sigma, rate = self.pair.noise_multiplier, self.pair.sample_rate
            x = self.pair.thresholds(np.asarray(t, float))
            if self.pair.direction == "add":
                # The loss falls with x, and nothing exceeds its supremum.
                # P is the Gaussian without the record: the loss
                # is at most t where x is at least the threshold.
                below: Array = ndtr(-x / sigma)
                return below
            # The loss rises with x. P is the same mixture for `remove` and `replace`, whose Q differ.
            mass: Array = (1 - rate) * ndtr(x / sigma) + rate * ndtr((x - 1) / sigma)
            return mass

        def rdp(self, alpha: float) -> float:
            if math.isinf(alpha):
                return math.inf
            # E_P[(P/Q)^(α - 1)] is the moment generating function of the loss under P.
            return log_mgf([self.pair], alpha - 1) / (alpha - 1)

    package = Package(
        prvs=[Loss(pair) for pair in pairs if isinstance(pair, SampledPair)],
        max_self_compositions=[pair.steps for pair in pairs],
        eps_error=eps_error,
        delta_error=delta_error,
    )
    return package.compute_composition([pair.steps for pair in pairs])
