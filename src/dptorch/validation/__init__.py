"""Can this model be trained, and is its gradient right?

`check` compares the tape with a loop over single examples.
`prepare` replaces modules that mix examples.
"""

from dptorch.validation.conversion import preparation, prepare
from dptorch.validation.gradient_check import CheckReport, check

__all__ = ["CheckReport", "check", "preparation", "prepare"]
