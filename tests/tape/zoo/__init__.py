"""Models of every kind that the tape must be exact on, small, in float64: one file a kind."""

from tests.tape.zoo import language, layers, sequences, uses, vision
from tests.tape.zoo.base import ZOO, B, Case

__all__ = ["ZOO", "B", "Case", "language", "layers", "published", "sequences", "uses", "vision"]


def published(name: str) -> bool:
    """Whether a case is an architecture of a library, and none made here to try one thing."""
    return ZOO[name].__module__ in (language.__name__, vision.__name__)
