"""Models of every kind that the tape must be exact on, small, in float64: one file a kind."""

from tests.tape.zoo import language, layers, sequences, uses, vision
from tests.tape.zoo.base import ZOO, B, Case

__all__ = ["ZOO", "B", "Case", "language", "layers", "sequences", "uses", "vision"]
