"""Lower bounds on ε from right and wrong guesses about members, one file for each argument."""

from dptorch.audit.bounds.bound import BOUNDS, Bound, get_bound
from dptorch.audit.bounds.gaussian_shape import (
    GaussianCounts,
    mu_lower_bound,
    mu_lower_bound_from_scores,
)
from dptorch.audit.bounds.many_runs import ClopperPearson, clopper_pearson_epsilon
from dptorch.audit.bounds.one_run import OneRun, one_run_epsilon, one_run_p_value
from dptorch.audit.bounds.one_run_fdp import one_run_fdp_epsilon, one_run_fdp_refutes

__all__ = [
    "BOUNDS",
    "Bound",
    "ClopperPearson",
    "GaussianCounts",
    "OneRun",
    "clopper_pearson_epsilon",
    "get_bound",
    "mu_lower_bound",
    "mu_lower_bound_from_scores",
    "one_run_epsilon",
    "one_run_fdp_epsilon",
    "one_run_fdp_refutes",
    "one_run_p_value",
]
