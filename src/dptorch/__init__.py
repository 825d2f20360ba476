"""dptorch: differential privacy for any PyTorch model.

Names are imported when they are asked for, so that what needs no tensors (``dptorch --help``) loads no
torch.
"""

import importlib as _importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from dptorch.engine.diagnostics import StepDiagnostics
    from dptorch.engine.make_private import Private, make_private
    from dptorch.engine.privacy_engine import PrivacyEngine
    from dptorch.plan import PrivacyPlan, PrivacySpent, make_plan
    from dptorch.statement import Statement
    from dptorch.tape import Tape, record
    from dptorch.text.predictor import load
    from dptorch.validation.conversion import preparation, prepare
    from dptorch.validation.gradient_check import CheckReport, check

#: The installed version.
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

_HOME = {
    "CheckReport": "validation.gradient_check",
    "PrivacyEngine": "engine.privacy_engine",
    "PrivacyPlan": "plan",
    "PrivacySpent": "plan",
    "Private": "engine.make_private",
    "Statement": "statement",
    "StepDiagnostics": "engine.diagnostics",
    "Tape": "tape",
    "check": "validation.gradient_check",
    "load": "text.predictor",
    "make_plan": "plan",
    "make_private": "engine.make_private",
    "preparation": "validation.conversion",
    "prepare": "validation.conversion",
    "record": "tape",
}
#: Rooms that can be reached as attributes: ``dptorch.tape.public_number`` after ``import dptorch``.
_ROOMS = frozenset(
    {"accounting", "clipping", "distributed", "engine", "errors", "ledger", "noise", "plan"}
    | {"randomness", "sampling", "statement", "tape", "validation"}
)


def __getattr__(name: str) -> _Any:
    """Import a name, or a room, when it is first asked for."""
    if name in _HOME:
        found = getattr(_importlib.import_module(f"dptorch.{_HOME[name]}"), name)
        globals()[name] = found
        return found
    if name in _ROOMS:
        return _importlib.import_module(f"dptorch.{name}")
    raise AttributeError(f"module 'dptorch' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names of the package, those not yet imported included."""
    return sorted({*globals(), *__all__, *_ROOMS})
