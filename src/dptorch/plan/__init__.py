"""The plan of a run: everything its guarantee depends on, and how it is made from what a user knows."""

from dptorch.plan.privacy_plan import (
    LOSS_REDUCTIONS,
    UNITS,
    PrivacyPlan,
    PrivacySpent,
)
from dptorch.plan.settings import PlanSettings, default_delta, make_plan

__all__ = [
    "LOSS_REDUCTIONS",
    "UNITS",
    "PlanSettings",
    "PrivacyPlan",
    "PrivacySpent",
    "default_delta",
    "make_plan",
]
