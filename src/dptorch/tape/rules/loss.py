"""Mean losses whose divisor depends on the batch, made per-example.

``cross_entropy(..., reduction="mean")`` with an ignored index or class weights divides by a count
taken over the whole batch, so that one example's tokens rescale every other example's gradient. The
tape computes the mean over each example's own positions, and the mean of those: exactly what a loop
over single examples gives, and equal to PyTorch's value whenever all divisors are equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dptorch.tape.calls import Call
from dptorch.tape.propagation.losses import reduction_of
from dptorch.tape.provenance import Reduced, Tag, rows

if TYPE_CHECKING:
    from dptorch.tape.recording import Recording

__all__ = ["LOSSES"]


def _mean_of_means(losses: Tensor, weights: Tensor, tag: Tag, n: int) -> Tensor:
    loss_B = rows(losses, tag, n).flatten(1).sum(1)
    weight_B = rows(weights, tag, n).flatten(1).sum(1)
    # An example without a counted position has no loss, rather than 0/0.
    return (loss_B / weight_B.clamp(min=torch.finfo(weight_B.dtype).tiny)).mean()


def cross_entropy(call: Call, recording: Recording) -> Any:
    """F.cross_entropy and F.nll_loss with reduction="mean" and class indices."""
    scores, target = call.args[0], call.arg(1, "target")
    weight, ignore = call.arg(2, "weight"), call.arg(4, "ignore_index", -100)
    if reduction_of(call) != "mean" or target.is_floating_point() or call.batch_size == 1:
        return NotImplemented
    tag = call.tag_of(scores)
    if tag is None or not tag.regular or tag.dim == 1:
        return NotImplemented
    assert tag.dim is not None
    target_tag = call.tag_of(target)
    losses_tag = tag.at(tag.dim - (tag.dim > 1))
    if target_tag is not None and target_tag != losses_tag:
        return NotImplemented
    kwargs: dict[str, Any] = {"weight": weight, "ignore_index": ignore, "reduction": "none"}
    if call.name == "cross_entropy":
        kwargs["label_smoothing"] = call.arg(7, "label_smoothing", 0.0)
    losses = call.func(scores, target, **kwargs)
    counted = target != ignore
    weights = counted.to(losses.dtype)
    if weight is not None:
        weights = weights * weight[target.clamp(0, weight.shape[0] - 1)].to(losses.dtype)
    out = _mean_of_means(losses, weights, losses_tag, call.batch_size)
    recording.mark(out, Reduced(1.0 / call.batch_size))
    return out


LOSSES = {"cross_entropy": cross_entropy, "nll_loss": cross_entropy}
