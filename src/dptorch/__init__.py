"""dptorch: differential privacy for any PyTorch model."""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from dptorch.engine.diagnostics import StepDiagnostics
from dptorch.engine.make_private import Private, make_private
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.plan import PrivacyPlan, PrivacySpent, make_plan
from dptorch.statement import Statement
from dptorch.tape import Tape, record
from dptorch.validation.conversion import preparation, prepare
from dptorch.validation.gradient_check import CheckReport, check

if _TYPE_CHECKING:
    from dptorch.training.predictor import load

__version__ = _version("dptorch")

__all__ = [
    "CheckReport",
    "PrivacyEngine",
    "PrivacyPlan",
    "PrivacySpent",
    "Private",
    "Statement",
    "StepDiagnostics",
    "Tape",
    "__version__",
    "check",
    "load",
    "make_plan",
    "make_private",
    "preparation",
    "prepare",
    "record",
]


def __getattr__(name: str) -> _Any:
    """Import what few programs need when it is asked for."""
    if name == "load":
        from dptorch.training.predictor import load

        return load
    raise AttributeError(f"module 'dptorch' has no attribute {name!r}")
