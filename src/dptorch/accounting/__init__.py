"""Privacy accounting: (ε, δ) from the history of a run's releases, and the reverse.

Example:
    >>> from dptorch import accounting
    >>> round(accounting.epsilon(
    ...     sample_rate=0.01, noise_multiplier=1.0, steps=1000, delta=1e-5, accountant="exact"), 4)
    1.8282
"""

from dptorch.accounting.accountants.protocol import Accountant
from dptorch.accounting.accountants.registry import accountant_names, get_accountant
from dptorch.accounting.adjacency import Adjacency
from dptorch.accounting.correlated import (
    BufferedGaussian,
    CorrelatedGaussian,
    CyclicGaussian,
    SeparatedGaussian,
    strategy_sensitivity,
)
from dptorch.accounting.events import (
    EpochwiseGaussian,
    Event,
    FixedSizeGaussian,
    History,
    PureRelease,
    RandomAllocationGaussian,
    SampledDiscreteGaussian,
    SampledGaussian,
    TruncatedPoissonGaussian,
    merge,
)
from dptorch.accounting.pairs.pure import pure_delta, pure_epsilon
from dptorch.accounting.pairs.sampled import gaussian_mu_for
from dptorch.accounting.planning.budget import Choice, plan_budget
from dptorch.accounting.planning.calibration import noise_multiplier_for
from dptorch.accounting.planning.solve import delta, epsilon, noise_multiplier, sample_rate, steps
from dptorch.accounting.planning.tradeoff import GaussianFit, gaussian_fit, trade_off_curve
from dptorch.accounting.planning.tuning import RUN_LAWS, RunLaw, tuned_epsilon
from dptorch.accounting.toeplitz import Workload, workload_error

__all__ = [
    "RUN_LAWS",
    "Accountant",
    "Adjacency",
    "BufferedGaussian",
    "Choice",
    "CorrelatedGaussian",
    "CyclicGaussian",
    "EpochwiseGaussian",
    "Event",
    "FixedSizeGaussian",
    "GaussianFit",
    "History",
    "PureRelease",
    "RandomAllocationGaussian",
    "RunLaw",
    "SampledDiscreteGaussian",
    "SampledGaussian",
    "SeparatedGaussian",
    "TruncatedPoissonGaussian",
    "Workload",
    "accountant_names",
    "delta",
    "epsilon",
    "gaussian_fit",
    "gaussian_mu_for",
    "get_accountant",
    "merge",
    "noise_multiplier",
    "noise_multiplier_for",
    "plan_budget",
    "pure_delta",
    "pure_epsilon",
    "sample_rate",
    "steps",
    "strategy_sensitivity",
    "trade_off_curve",
    "tuned_epsilon",
    "workload_error",
]
