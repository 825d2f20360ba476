"""Where the examples are in the result of an op that touches no parameter: one op family a file.

To add an op: write a function ``family(call, outputs) -> Tag`` in the file of its family and decorate
it with ``@family("name")``, the name being the op's `canonical_name`; `table` says what it may return.
"""

from dptorch.tape.propagation import (
    elementwise,
    joining,
    layers,
    losses,
    matrices,
    movement,
    products,
    reductions,
    writing,
)
from dptorch.tape.propagation.inference import infer
from dptorch.tape.propagation.table import FAMILIES, rowwise

__all__ = [
    "FAMILIES",
    "elementwise",
    "infer",
    "joining",
    "layers",
    "losses",
    "matrices",
    "movement",
    "products",
    "reductions",
    "rowwise",
    "writing",
]
