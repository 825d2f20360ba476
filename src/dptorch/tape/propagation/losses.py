"""Loss functions: unreduced they keep the examples, reduced they become `Reduced`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.tape.propagation.elementwise import elementwise
from dptorch.tape.propagation.table import Found, agree, family
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Lost, Reduced, Tag, broadcast_shape, owners

__all__ = ["reduction_of"]

# How the operators that torch.nn.functional calls number their reductions.
_NUMBERED = {0: "none", 1: "mean", 2: "sum"}


def reduction_of(call: Call) -> str:
    """The reduction a loss function was called with.

    Raises:
        Lost: for the deprecated arguments size_average and reduce.
    """
    if call.arg("size_average") is not None or call.arg("reduce") is not None:
        raise Lost("size_average and reduce are deprecated; use reduction=")
    reduction = call.arg("reduction", "mean")
    return _NUMBERED[reduction] if isinstance(reduction, int) else str(reduction)


def _reduced_or(call: Call, unreduced: Callable[[], Found], rows: Tag | None = None) -> Found:
    """What the reduction makes of a loss; `rows` tells whose its terms are where operands do not."""
    reduction = reduction_of(call)
    if reduction not in ("none", "sum", "mean", "batchmean"):
        raise Lost(f"reduction={reduction!r} is not known")
    if reduction == "none":
        return unreduced()
    tags = [tag for _, tag in call.tagged] if rows is None else [rows]
    if not all(tag.regular for tag in tags) and reduction != "sum":
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
    shapes = [t.shape for t in call.operands()]
    if call.name == "gaussian_nll_loss":
        # torch appends a dimension to the variance where it has one value for each row
        x, var = call.arg("input"), call.arg("var")
        if isinstance(var, Tensor) and var.shape != x.shape and var.shape == x.shape[:-1]:
            return _rows_of_variance(call, outputs)
    weighted = call.name in ("mse_loss", "l1_loss") and call.arg("weight") is not None
    if weighted and reduction_of(call) == "mean" and call.batch_size > 1:
        raise Lost("the mean is divided by the weights of the whole batch")
    probe = torch.empty(broadcast_shape(*shapes), device="meta")
    elementwise(call, [probe])  # the operands must agree, reduced or not
    return _reduced_or(call, lambda: elementwise(call, outputs))


def _rows_of_variance(call: Call, outputs: Sequence[Any]) -> Found:
    agreed = agree([tag for _, tag in call.tagged])
    if agreed.dim is None or agreed.dim >= call.arg("var").dim():
        raise Lost("the variance is of other examples")
    return _reduced_or(call, lambda: agreed)


@family(
    """multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss cosine_embedding_loss
    triplet_margin_loss"""
)
def row_loss(call: Call, outputs: Sequence[Any]) -> Found:
    """Losses with one value a row of dimension 0; class weights carry no examples."""
    weight = call.arg("weight")
    if any(t.dim() < 2 for t, _ in call.tagged if t is not call.arg("target")) or (
        call.first.dim() < 2
    ):
        raise Lost("the loss is of one row")
    if weight is not None and call.tag_of(weight) is not None:
        raise Lost("the weights of the classes carry examples")
    if any(tag.dim != 0 for _, tag in call.tagged):
        raise Lost("the rows of the loss are not the examples")
    if any(t.shape[0] != call.first.shape[0] for t, _ in call.tagged):
        raise Lost("an operand is broadcast along its examples")
    agreed = agree([tag for _, tag in call.tagged])
    return _reduced_or(call, lambda: agreed)


@family("ctc_loss _ctc_loss")
def ctc_loss(call: Call, outputs: Sequence[Any]) -> Found:
    """Scores [T, N, C] against targets [N, S], or targets one after another and their lengths."""
    scores, targets = call.arg("log_probs"), call.arg("targets")
    tag = call.tag_of(scores)
    if tag is None or tag.dim != 1 or scores.dim() != 3:
        raise Lost("the rows of the loss are not the examples")
    rows = tag.at(0)
    lengths = call.arg("target_lengths")
    for t, g in call.tagged:
        if t is scores or (t is targets and t.dim() == 1):
            continue
        if g != rows:
            raise Lost("the scores, targets and lengths are of different examples")
    of = call.tag_of(targets)
    if targets.dim() == 1 and (of is not None or call.tag_of(lengths) is not None):
        counts = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
        first = owners(rows, scores.shape[1], call.batch_size).tolist()
        expected = [o for o, k in zip(first, counts, strict=True) for _ in range(k)]
        held = None if of is None else owners(of, targets.shape[0], call.batch_size).tolist()
        if held is None or of is None or of.dim != 0 or held[: len(expected)] != expected:
            raise Lost("the targets in a row are not cut where one example's end")
    if call.name == "_ctc_loss":
        return rows
    # each loss is divided by the length of its own target before the mean
    return _reduced_or(call, lambda: rows, rows)


@family("cross_entropy nll_loss cross_entropy_loss nll_loss_nd nll_loss2d")
def class_loss(call: Call, outputs: Sequence[Any]) -> Found:
    """Class scores [N, C, ...] against classes [N, ...]."""
    found: list[Tag] = []
    scores, target = call.arg("input"), call.arg("target")
    for t, tag in call.tagged:
        if t is not scores and t is not target:
            raise Lost("the weights of the classes carry examples")
        assert tag.dim is not None
        if t.dim() == scores.dim():
            if tag.dim == 1 or scores.dim() == 1:
                raise Lost("the classes lie where the examples are")
            found.append(tag.at(tag.dim - (tag.dim > 1)))
        else:
            found.append(tag)
    tag = agree(found)
    if tag.explicit is not None and len(found) < 2:
        raise Lost("a constant with one row for each meets irregularly ordered examples")
    if reduction_of(call) == "mean" and not target.is_floating_point():
        # rules.loss makes this exact; what it declines divides by a count over the whole batch.
        raise Lost("a mean loss whose divisor depends on the whole batch")
    return _reduced_or(call, lambda: tag)
