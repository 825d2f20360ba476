"""Rules: one file an op family. See `registry` for how to add one."""

from dptorch.tape.rules import (
    broadcast,
    contraction,
    convolution,
    embedding,
    normalisation,
    recurrent,
    vocabulary,
)
from dptorch.tape.rules.generic_rule import generic
from dptorch.tape.rules.loss import HALF, LOSSES, mean_in_float32
from dptorch.tape.rules.registry import RULES, rule

__all__ = [
    "HALF",
    "LOSSES",
    "RULES",
    "broadcast",
    "contraction",
    "convolution",
    "embedding",
    "generic",
    "mean_in_float32",
    "normalisation",
    "recurrent",
    "rule",
    "vocabulary",
]
