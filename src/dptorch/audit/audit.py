"""`audit`: one call for a plan or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dptorch.audit.result import AuditResult
from dptorch.audit.white_box import audit_plan
from dptorch.engine import PrivacyEngine
from dptorch.errors import ConfigurationError
from dptorch.plan import PrivacyPlan

__all__ = ["audit"]


def audit(target: PrivacyPlan | PrivacyEngine | str | Path, **settings: Any) -> AuditResult:
    """x"""
    if isinstance(target, PrivacyEngine):
        target = target.plan
    if isinstance(target, PrivacyPlan):
        return audit_plan(target, **settings)
    raise ConfigurationError(f"{target!r} is no plan or a run")
