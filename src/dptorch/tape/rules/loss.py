"""Mean losses whose divisor depends on the batch, made per-example.

``cross_entropy(..., reduction="mean")`` with an ignored index divides by a count taken over the whole
batch, so that one example's tokens rescale every other example's gradient. The tape computes the
mean over each example's own counted positions, and the mean of those: exactly what a loop over
single examples gives, and equal to PyTorch's value whenever all counts are equal.

With class weights PyTorch divides by the sum of the weights that the batch happens to hold. Here the
weighted losses are divided by the number of positions, a weight being as much as it says: PyTorch's
value times the mean weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dptorch.tape.propagation.losses import reduction_of
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Reduced, Tag, rows
from dptorch.tape.rules.recorder import Recorder

__all__ = ["LOSSES"]


def _mean_of_means(losses: Tensor, counted: Tensor, tag: Tag, n: int) -> Tensor:
    loss_B = rows(losses, tag, n).flatten(1).sum(1)
    count_B = rows(counted, tag, n).flatten(1).sum(1)
    # An example without a counted position has no loss, rather than 0/0.
    return (loss_B / count_B.clamp(min=1)).mean()


def cross_entropy(call: Call, recording: Recorder) -> Any:
    """F.cross_entropy and F.nll_loss with reduction="mean" and class indices."""
    scores, target = call.arg("input"), call.arg("target")
    weight, ignore = call.arg("weight"), call.arg("ignore_index", -100)
    if reduction_of(call) != "mean" or target.is_floating_point():
        return NotImplemented
    tag = call.tag_of(scores)
    alone = call.batch_size == 1  # then PyTorch's divisor is the example's own, but for weights
    if tag is None or (weight is None if alone else not tag.regular or tag.dim == 1):
        return NotImplemented
    losses_tag = tag if tag.dim is None else tag.at(tag.dim - (tag.dim > 1))
    target_tag = call.tag_of(target)
    if target_tag is not None and target_tag != losses_tag:
        return NotImplemented
    kwargs: dict[str, Any] = {"weight": weight, "ignore_index": ignore, "reduction": "none"}
    if call.name == "cross_entropy":
        kwargs["label_smoothing"] = call.arg("label_smoothing", 0.0)
    losses = call.func(scores, target, **kwargs)
    if losses.shape == (call.batch_size,):  # one position each; the loss of an ignored one is 0
        out = losses.mean()
    else:
        out = _mean_of_means(losses, target != ignore, losses_tag, call.batch_size)
    recording.mark(out, losses_tag if alone else Reduced("mean"))
    return out


LOSSES = {"cross_entropy": cross_entropy, "nll_loss": cross_entropy}
