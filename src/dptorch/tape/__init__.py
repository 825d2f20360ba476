"""Per-example gradients of any PyTorch model: recording, rules, and the tape they fill."""

from dptorch.tape.gradients.tape import Tape
from dptorch.tape.propagation import rowwise
from dptorch.tape.provenance.public_number import public_number
from dptorch.tape.recording.batch_dims import Ragged
from dptorch.tape.recording.functional import record
from dptorch.tape.recording.reads import trusted_reads
from dptorch.tape.recording.recording import Recording

__all__ = ["Ragged", "Recording", "Tape", "public_number", "record", "rowwise", "trusted_reads"]
