"""dptorch: differential privacy for any PyTorch model."""

from dptorch.engine import PrivacyEngine, Private, StepDiagnostics, make_private
from dptorch.plan import PrivacyPlan, PrivacySpent, make_plan
from dptorch.statement import Statement
from dptorch.tape import Tape, record

__version__ = "0.1.0"

__all__ = [
    "PrivacyEngine",
    "PrivacyPlan",
    "PrivacySpent",
    "Private",
    "Statement",
    "StepDiagnostics",
    "Tape",
    "__version__",
    "make_plan",
    "make_private",
    "record",
]
