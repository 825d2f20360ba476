"""Loss functions: unreduced they keep the examples, reduced they become `Reduced`."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.tape.propagation.elementwise import elementwise
from dptorch.tape.propagation.table import Found, agree, family
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost, Reduced, broadcast_shape

__all__ = ["reduction_of"]

# Where `reduction` stands when it is given by position.
_REDUCTION_POSITION = {
    "cross_entropy": 6,
    "nll_loss": 6,
    "binary_cross_entropy": 5,
    "binary_cross_entropy_with_logits": 5,
    "huber_loss": 2,
    "gaussian_nll_loss": 5,
    "poisson_nll_loss": 7,
    "ctc_loss": 5,
    "multi_margin_loss": 7,
    "multilabel_soft_margin_loss": 5,
    "cosine_embedding_loss": 6,
    "margin_ranking_loss": 6,
    "hinge_embedding_loss": 5,
    "triplet_margin_loss": 9,
}


def reduction_of(call: Call) -> str:
    """The reduction a loss function was called with.

    Raises:
        Lost: for the deprecated arguments size_average and reduce, and for torch's inner loss
            functions, which number their reductions.
    """
    if not isinstance(call.func, types.FunctionType):
        raise Lost("it is an inner function of torch; call the one in torch.nn.functional")
    if call.kwargs.get("size_average") is not None or call.kwargs.get("reduce") is not None:
        raise Lost("size_average and reduce are deprecated; use reduction=")
    position = _REDUCTION_POSITION.get(call.name, 4)
    return str(call.arg(position, "reduction", "mean"))


def _reduced_or(call: Call, unreduced: Callable[[], Found]) -> Found:
    reduction = reduction_of(call)
    if reduction not in ("none", "sum", "mean", "batchmean"):
        raise Lost(f"reduction={reduction!r} is not known")
    if reduction == "none":
        return unreduced()
    if not all(tag.regular for _, tag in call.tagged) and reduction != "sum":
        raise Lost("a mean over examples of unequal sizes")
    if reduction == "batchmean" and any(tag.dim != 0 for _, tag in call.tagged):
        raise Lost("batchmean divides by dimension 0, where the examples are not")
    return Reduced("sum" if reduction == "sum" else "mean")


@family(
    """mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div poisson_nll_loss
    binary_cross_entropy_with_logits gaussian_nll_loss soft_margin_loss margin_ranking_loss
    hinge_embedding_loss"""
)
def elementwise_loss(call: Call, outputs: Sequence[Any]) -> Found:
    """Losses over elements: without reduction elementwise."""
    operands = [t for t, _ in call.tagged]
    operands += [a for a in (*call.args[:3], *call.kwargs.values()) if isinstance(a, Tensor)]
    probe = torch.empty(broadcast_shape(*[t.shape for t in operands]), device="meta")
    elementwise(call, [probe])  # the operands must agree, reduced or not
    return _reduced_or(call, lambda: elementwise(call, outputs))


@family(
    """multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss ctc_loss
    cosine_embedding_loss triplet_margin_loss"""
)
def row_loss(call: Call, outputs: Sequence[Any]) -> Found:
    """Losses with one value a row of dimension 0 (ctc_loss: of dimension 1 of its scores)."""
    dim = 1 if call.name == "ctc_loss" else 0
    for t, tag in call.tagged:
        if tag.dim != (dim if t is call.args[0] else 0):
            raise Lost("the rows of the loss are not the examples")
    agreed = agree([g.at(0) for _, g in call.tagged])
    return _reduced_or(call, lambda: agreed)


@family("cross_entropy nll_loss")
def class_loss(call: Call, outputs: Sequence[Any]) -> Found:
    """Class scores [N, C, ...] against classes [N, ...]."""
    found = []
    scores = call.arg(0, "input")
    for t, tag in call.tagged:
        assert tag.dim is not None
        if t is scores or t.dim() == scores.dim():
            if tag.dim == 1 or scores.dim() == 1:
                raise Lost("the classes lie where the examples are")
            found.append(tag.at(tag.dim - (tag.dim > 1)))
        else:
            found.append(tag)
    tag = agree(found)
    target = call.arg(1, "target")
    if reduction_of(call) == "mean" and not target.is_floating_point():
        # rules.loss makes this exact; what it declines divides by a count over the whole batch.
        raise Lost("a mean loss whose divisor depends on the whole batch")
    return _reduced_or(call, lambda: tag)
