"""Per-example gradients of any PyTorch model: recording, rules, and the tape they fill."""

from dptorch.tape.gradients.tape import Tape
from dptorch.tape.propagation import rowwise
from dptorch.tape.provenance.public_number import public_number
from dptorch.tape.recording.batch_dims import Ragged
from dptorch.tape.recording.functional import record
from dptorch.tape.recording.reads import trusted_reads
from dptorch.tape.recording.recording import Recording
from dptorch.tape.rules.vocabulary import summed_cross_entropy

__all__ = [
    "Ragged",
    "Recording",
    "Tape",
    "public_number",
    "record",
    "rowwise",
    "summed_cross_entropy",
    "trusted_reads",
]
