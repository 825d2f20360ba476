"""The keyword arguments of an engine, for whatever passes them on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dptorch.distributed import Ranks
from dptorch.errors import ConfigurationError
from dptorch.plan import PlanSettings, PrivacyPlan
from dptorch.tape.recording.batch_dims import BatchDims

if TYPE_CHECKING:
    from dptorch.ledger import DatasetLedger

__all__ = ["EngineSettings", "checked_budget"]


class EngineSettings(PlanSettings, total=False):
    """The keyword arguments of `dptorch.PrivacyEngine`, which says what each means."""

    plan: PrivacyPlan | None
    clipping_mode: str
    memory_budget: float | None
    on_budget_exhausted: str
    batch_dims: BatchDims
    self_check: bool
    ledger: DatasetLedger | None
    secure_rng: bool
    seed: int | None
    ranks: Ranks | None


def checked_budget(memory_budget: float | None) -> float | None:
    """Return `memory_budget`.

    Raises:
        ConfigurationError: it is negative, or NaN.
    """
    if memory_budget is not None and not memory_budget >= 0:
        raise ConfigurationError(
            f"memory_budget={memory_budget!r} must be a number of bytes, 0 or more; or None for half "
            "of what is free."
        )
    return memory_budget
