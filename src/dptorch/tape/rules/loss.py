"""Mean losses whose divisor depends on the batch, made per-example.

``cross_entropy(..., reduction="mean")`` with an ignored index or class weights divides by a count
taken over the whole batch, so that one example's tokens rescale every other example's gradient. The
tape computes the mean over each example's own positions, and the mean of those: exactly what a loop
over single examples gives, and equal to PyTorch's value whenever all divisors are equal.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dptorch.errors import PrivacyWarning
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
    if reduction_of(call) != "mean" or target.is_floating_point():
        return NotImplemented
    tag = call.tag_of(scores)
    alone = call.batch_size == 1  # then PyTorch's divisor is the example's own, but for weights
    if tag is None or (weight is None if alone else not tag.regular or tag.dim == 1):
        return NotImplemented
    if tag.dim is None:
        losses_tag = tag
    else:
        losses_tag = tag.at(tag.dim - (tag.dim > 1))
    target_tag = call.tag_of(target)
    if target_tag is not None and target_tag != losses_tag:
        return NotImplemented
    kwargs: dict[str, Any] = {"weight": weight, "ignore_index": ignore, "reduction": "none"}
    if call.name == "cross_entropy":
        kwargs["label_smoothing"] = call.arg(7, "label_smoothing", 0.0)
    losses = call.func(scores, target, **kwargs)
    weights = (target != ignore).to(losses.dtype)
    if weight is not None:
        warnings.warn(
            f"{call.name} with class weights and reduction='mean': PyTorch divides by the sum of the "
            "weights in the batch, which no single example may change for the others. Each example "
            "is divided by its own weights instead; with one label an example they cancel. For "
            "weights that count as they are use reduction='sum' and loss_reduction='sum'.",
            PrivacyWarning,
            stacklevel=3,
        )
        weights = weights * weight[target.clamp(0, weight.shape[0] - 1)].to(losses.dtype)
    out = _mean_of_means(losses, weights, losses_tag, call.batch_size)
    recording.mark(out, losses_tag if alone else Reduced("mean"))
    return out


LOSSES = {"cross_entropy": cross_entropy, "nll_loss": cross_entropy}
