"""Mean losses whose divisor depends on the batch, made per-example.

``cross_entropy(..., reduction="mean")`` with an ignored index divides by a count taken over the whole
batch, so that one example's tokens rescale every other example's gradient. The tape computes the
mean over each example's own counted positions, and the mean of those: exactly what a loop over
single examples gives, and equal to PyTorch's value whenever all counts are equal.

With class weights PyTorch divides by the sum of the weights that the batch happens to hold. Here the
weighted losses are divided by the number of positions, a weight being as much as it says: PyTorch's
value times the mean weight.

In half precision a mean is taken in float32, and stays there: 1 / B rounded to half precision would put
the number of rows B into every example's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dptorch.tape.propagation import infer
from dptorch.tape.propagation.elementwise import along_broadcast
from dptorch.tape.propagation.losses import reduction_of
from dptorch.tape.propagation.table import agree
from dptorch.tape.provenance.calls import Call, replace_tensors
from dptorch.tape.provenance.tags import Reduced, Tag, broadcast_shape, rows
from dptorch.tape.rules.recorder import Recorder
from dptorch.tape.rules.registry import rule

__all__ = ["HALF", "LOSSES", "mean_in_float32"]

#: The dtypes of half precision.
HALF = (torch.float16, torch.bfloat16)


def _mean_of_means(losses: Tensor, counted: Tensor, tag: Tag, n: int) -> Tensor:
    loss_B = rows(losses, tag, n).flatten(1).sum(1)
    count_B = rows(counted, tag, n).flatten(1).sum(1)
    # An example without a counted position has no loss, rather than 0/0.
    return _mean(loss_B / count_B.masked_fill(count_B == 0, 1))


def _mean(losses: Tensor) -> Tensor:
    return (losses.float() if losses.dtype in HALF else losses).mean()


def mean_in_float32(call: Call, recording: Recorder, out: Any) -> Any:
    """Return `out`, or the same in float32 where it is a mean over the examples in half precision."""
    if not isinstance(out, Tensor) or out.dtype not in HALF or not out.requires_grad:
        return out
    state = recording.state(out)
    if not isinstance(state, Reduced) or state.kind != "mean" or "dtype" in call.kwargs:
        return out
    again = call.run({id(t): t.float() for t in call.operands() if t.dtype in HALF})
    recording.mark(again, state)
    return again


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
        out = _mean(losses)
    else:
        out = _mean_of_means(losses, target != ignore, losses_tag, call.batch_size)
    recording.mark(out, losses_tag if alone else Reduced("mean"))
    return out


def weighted(call: Call, recording: Recorder) -> Any:
    """F.mse_loss and F.l1_loss with weights and reduction="mean", which divides by their sum."""
    x, target, weight = call.arg("input"), call.arg("target"), call.arg("weight")
    if weight is None or reduction_of(call) != "mean" or call.batch_size == 1:
        return NotImplemented
    tags = [along_broadcast(t, g, x.shape) for t, g in call.tagged if g.dim is not None]
    tag = agree(tags)
    if len(tags) < len(call.tagged) or not tag.regular:
        return NotImplemented
    losses = call.func(x, target, weight=weight, reduction="none")
    out = _mean_of_means(losses, weight, tag, call.batch_size)
    recording.mark(out, Reduced("mean"))
    return out


@rule("cross_entropy nll_loss")
def class_scores(call: Call, recording: Recorder) -> Any:
    """Scores that are parameters alone (a learnt prior of the classes, expanded to the batch)."""
    scores, target = call.arg("input"), call.arg("target")
    tag = call.tag_of(target)
    if [id(p) for p in call.parameters] != [id(scores)] or tag is None or len(call.tagged) > 1:
        return NotImplemented
    if tag.dim is not None:
        if tag.dim >= 1 and target.dim() < scores.dim():
            tag = tag.at(tag.dim + 1)
        if scores.shape[tag.dim] != target.shape[call.tagged[0][1].dim or 0]:
            return NotImplemented
    return _lifted(call, recording, scores.shape, tag)


@rule(
    """mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div poisson_nll_loss
    binary_cross_entropy_with_logits gaussian_nll_loss soft_margin_loss margin_ranking_loss
    hinge_embedding_loss"""
)
def elements(call: Call, recording: Recorder) -> Any:
    """Losses over elements, a parameter among them (a variance, a weight of the positive class)."""
    try:
        shape = broadcast_shape(*[t.shape for t in call.operands()])
    except RuntimeError:  # the variance of gaussian_nll_loss may lack the last dimension
        return NotImplemented
    found = [g if g.dim is None else along_broadcast(t, g, shape) for t, g in call.tagged]
    return _lifted(call, recording, shape, agree(found))


def _lifted(call: Call, recording: Recorder, shape: torch.Size, tag: Tag) -> Any:
    """The loss with its parameters replaced by copies that carry the examples along `tag`."""
    table = {}
    for p in call.parameters:
        target = [1] * (len(shape) - p.dim()) + list(p.shape)
        if tag.dim is not None:
            target[tag.dim] = shape[tag.dim]
        table[id(p)] = recording.lift(p, target, tag)
    args = tuple(replace_tensors(a, table) for a in call.args)
    kwargs = {k: replace_tensors(v, table) for k, v in call.kwargs.items()}
    tagged = [*call.tagged, *((t, tag) for t in table.values())]
    lifted = Call(call.func, call.name, args, kwargs, tagged, [], call.batch_size)
    if call.name in LOSSES:
        out = LOSSES[call.name](lifted, recording)
        if out is not NotImplemented:
            return out
    out = lifted.run()
    recording.mark(out, infer(lifted, (out,))[0])
    return mean_in_float32(lifted, recording, out)


LOSSES = {
    "cross_entropy": cross_entropy,
    "nll_loss": cross_entropy,
    "mse_loss": weighted,
    "l1_loss": weighted,
}
