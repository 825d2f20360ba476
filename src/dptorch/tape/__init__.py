"""Per-example gradients of any PyTorch model: recording, rules, and the tape they fill."""

from dptorch.tape.propagation import rowwise
from dptorch.tape.record import record
from dptorch.tape.recording import Recording
from dptorch.tape.tape import Tape

__all__ = ["Recording", "Tape", "record", "rowwise"]
