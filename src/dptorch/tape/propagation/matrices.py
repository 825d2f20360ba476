"""Linear algebra: matrices lie in the last two dimensions, all before them are batch dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dptorch.tape.propagation.table import Found, agree, family
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost

__all__: list[str] = []

# Operands that hold one vector, not one matrix, for each batch index.
_VECTORS = ("tau", "pivots", "LU_pivots")


@family(
    """linalg_cholesky_ex cholesky cholesky_inverse cholesky_solve _cholesky_solve_helper
    linalg_inv_ex linalg_pinv linalg_qr geqrf linalg_householder_product ormqr linalg_matrix_exp
    _linalg_det _linalg_slogdet _linalg_eigh linalg_eig _linalg_eigvals _linalg_svd
    _linalg_solve_ex linalg_solve_triangular triangular_solve linalg_lstsq linalg_lu
    linalg_lu_factor_ex linalg_lu_solve lu_unpack linalg_ldl_factor_ex linalg_ldl_solve"""
)
def matrices(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """Decompositions and solvers: each matrix by itself."""
    operands = [(n, t) for n, t in call.bound.items() if isinstance(t, Tensor)]
    rank, found = 0, []
    for name, t in operands:
        inner = 1 if _is_vector(call, name, t) else 2
        rank = max(rank, t.dim() - inner)
    for name, t in operands:
        tag = call.tag_of(t)
        if tag is None:
            continue
        inner = 1 if _is_vector(call, name, t) else 2
        assert tag.dim is not None
        before = t.dim() - inner - tag.dim  # counted from the matrix
        if before < 1:
            raise Lost("the rows or columns of a matrix are the examples")
        found.append(tag.at(rank - before))
    agreed = agree(found)
    assert agreed.dim is not None
    if agreed.explicit is not None and any(
        call.tag_of(t) is None and t.dim() > 2 for _, t in operands
    ):
        raise Lost("a constant with one matrix for each meets irregularly ordered examples")
    size = next(t.shape[g.dim] for t, g in call.tagged if g.dim is not None)
    return [
        agreed
        if isinstance(o, Tensor) and o.dim() > agreed.dim and o.shape[agreed.dim] == size
        else None
        for o in outputs
    ]


def _is_vector(call: Call, name: str, t: Tensor) -> bool:
    """Whether an operand holds one vector for each batch index: pivots, reflector scales, and the
    right-hand side of a solver where torch decides so."""
    if name in _VECTORS or (call.name == "ormqr" and name == "input2"):
        return True
    if call.name != "_linalg_solve_ex" or name != "B":
        return False
    a = call.arg("A")
    return t.dim() == 1 or (a.dim() - 1 == t.dim() and t.shape == a.shape[:-1])
