"""Note over how many values of each example means are taken.

In a batch that is padded to its longest example, a mean over positions divides by that example's
length. Which of a model's means are over positions is not known, but their sizes are: one that
changes from batch to batch is worth a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dptorch.tape.propagation.losses import reduction_of
from dptorch.tape.provenance.calls import Call, words
from dptorch.tape.provenance.tags import Reduced
from dptorch.tape.rules.recorder import Recorder

__all__ = ["MEANS", "Mean", "changed_mean", "note_mean"]

_BY_CLASS = words("cross_entropy nll_loss")
_BY_ELEMENT = words(
    """mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy soft_margin_loss
    binary_cross_entropy_with_logits poisson_nll_loss gaussian_nll_loss"""
)
#: The ops that can be a mean over positions.
MEANS = _BY_CLASS | _BY_ELEMENT | {"mean"}


class Mean(NamedTuple):
    """One mean: over how many values of each example, and whether it leaves some of them out."""

    values: int
    leaves_out: Callable[[], bool]


def note_mean(call: Call, out: Any, recording: Recorder) -> None:
    """Note the mean that `call`, one of `MEANS`, took of its examples, if it did, on the recording's
    tape."""
    if not isinstance(out, Tensor) or not out.requires_grad:
        return
    x = call.first
    tag = call.tag_of(x)
    if tag is None or not tag.regular or not x.numel() or not out.numel():
        return
    found = Mean(x.numel() // call.batch_size, lambda: False)
    if call.name == "mean":
        kept = call.batch_size if isinstance(recording.state(out), Reduced) else 1
        found = found._replace(values=x.numel() // (out.numel() * kept))
    elif reduction_of(call) != "mean":
        return
    elif call.name in _BY_CLASS:
        target, ignored = call.arg("target"), call.arg("ignore_index", -100)
        if target.is_floating_point():
            return
        values = target.numel() // call.batch_size
        found = Mean(values, lambda: bool((target == ignored).any()))
    recording.tape.means.append(found)


def changed_mean(before: Sequence[Mean], now: Sequence[Mean]) -> tuple[int, int] | None:
    """(values before, values now) of the first mean that is over another number of values, where
    neither leaves any out."""
    for a, b in zip(before, now, strict=False):
        if a.values != b.values and not a.leaves_out() and not b.leaves_out():
            return a.values, b.values
    return None
