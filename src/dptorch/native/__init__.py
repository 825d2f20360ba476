"""Loops in C, compiled once per machine; where they cannot be, torch or numpy does their work."""

from dptorch.native.compiler import SWITCH, build
from dptorch.native.threads import run_in_team

__all__ = ["SWITCH", "build", "run_in_team"]
