"""Loops in C, compiled once per machine; where they cannot be, torch or numpy does their work."""

from dptorch.native.compiler import HEADER, LIMIT, SWITCH, Units, build, checked_library, units
from dptorch.native.threads import run_in_team

__all__ = ["HEADER", "LIMIT", "SWITCH", "Units", "build", "checked_library", "run_in_team", "units"]
