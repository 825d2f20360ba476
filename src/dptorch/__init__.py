"""dptorch: differential privacy for any PyTorch model."""

from dptorch.check import CheckReport, check
from dptorch.engine import PrivacyEngine
from dptorch.logical_batch import StepDiagnostics
from dptorch.plan import PrivacyPlan, PrivacySpent, make_plan
from dptorch.prepare import preparation, prepare
from dptorch.private import Private, make_private
from dptorch.statement import Statement
from dptorch.tape import Tape, record

__version__ = "0.1.0"

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
    "make_plan",
    "make_private",
    "preparation",
    "prepare",
    "record",
]
