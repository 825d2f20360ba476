"""A plan from the options of `dptorch epsilon` and `dptorch calibrate`."""

from __future__ import annotations

from typing import Any

from dptorch.plan import PrivacyPlan, make_plan

__all__ = ["plan_from"]


def plan_from(
    *,
    sample_rate: float | None,
    batch_size: float | None,
    sample_size: int | None,
    target_delta: float | None,
    **settings: Any,
) -> PrivacyPlan:
    """`make_plan`, where a sample rate and δ are enough: accounting needs no number of records.

    Example:
        >>> plan = plan_from(sample_rate=0.5, batch_size=None, sample_size=None, target_delta=1e-5,
        ...                  steps=3, noise_multiplier=2.0)
        >>> plan.sample_size is None
        True
    """
    if sample_rate is not None and batch_size is None and sample_size is None:
        batch_size = 1.0  # the divisor of the noisy sum, on which ε does not depend
    return make_plan(
        sample_rate=sample_rate,
        batch_size=batch_size,
        sample_size=sample_size,
        target_delta=target_delta,
        **settings,
    )
