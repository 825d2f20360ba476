"""`get_noise_multiplier` of ``opacus.accountants.utils``."""

from __future__ import annotations

from typing import Any

from dptorch.accounting import Adjacency
from dptorch.compat.arguments import known_arguments
from dptorch.compat.opacus.accountants import create_accountant
from dptorch.plan import make_plan

__all__ = ["get_noise_multiplier"]


@known_arguments
def get_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    epochs: float | None = None,
    steps: int | None = None,
    accountant: str = "rdp",
    epsilon_tolerance: float = 0.01,
    eps_error: float | None = None,
    delta_error: float | None = None,
    alphas: Any = None,
) -> float:
    """The smallest noise multiplier (to 0.02 %) that keeps a run within `target_epsilon`.

    Args:
        target_epsilon, target_delta, sample_rate: as in `dptorch.make_plan`.
        epochs, steps: one of them: the length of the run.
        accountant: "prv", "rdp" or "gdp".
        epsilon_tolerance, eps_error, delta_error, alphas: accepted: the search here is finer, and
            the accountants have errors and orders of their own.

    Raises:
        ConfigurationError: for a target out of reach, or a value out of range.

    Example:
        >>> round(get_noise_multiplier(
        ...     target_epsilon=3.0, target_delta=1e-5, sample_rate=0.01, steps=1000), 2)
        0.86
    """
    plan = make_plan(
        sample_rate=sample_rate,
        batch_size=1.0,  # what sums are divided by does not matter here
        epochs=epochs,
        steps=steps,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        accountant=create_accountant(accountant).name,
        adjacency=Adjacency.ADD_REMOVE,
    )
    return plan.noise_multiplier
