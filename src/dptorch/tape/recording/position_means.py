"""Note over how many values of each example means are taken, and which rows sums leave out.

In a batch that is padded to its longest example, a mean over positions divides by that example's
length. Where it is known how far the engine's loader padded a batch, such a mean in the loss is
refused. Elsewhere it is not known which means are over positions, but their sizes are: one that changes
from batch to batch is worth a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dptorch.errors import ExamplesMixError
from dptorch.tape.propagation.losses import reduction_of
from dptorch.tape.provenance.calls import Call, words
from dptorch.tape.provenance.tags import NOBODY, Mixed, Reduced, State, Tag
from dptorch.tape.recording.padding import Padding
from dptorch.tape.recording.value_sizes import is_sized
from dptorch.tape.rules.recorder import Recorder

__all__ = ["MEANS", "Mean", "changed_mean", "judge_sum", "note_mean"]

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
    tape.

    Raises:
        ExamplesMixError: it is over the columns of a batch in which a row is padded.
    """
    if not isinstance(out, Tensor) or not out.requires_grad:
        return
    x = call.first
    tag = call.tag_of(x)
    if tag is None or not tag.regular or not x.numel() or not out.numel():
        return
    found = Mean(x.numel() // call.batch_size, lambda: False)
    over, over_tag = x, tag
    if call.name == "mean":
        is_loss = isinstance(recording.state(out), Reduced)
        kept = call.batch_size if is_loss else 1
        found = found._replace(values=x.numel() // (out.numel() * kept))
        if not is_loss and recording.refuses_reads:
            over = None  # inside a model; whether its outputs depend on the width is tested
    elif reduction_of(call) != "mean":
        return
    elif call.name in _BY_CLASS:
        target, ignored = call.arg("target"), call.arg("ignore_index", -100)
        if target.is_floating_point():
            return
        values = target.numel() // call.batch_size
        found = Mean(values, lambda: bool((target == ignored).any()))
        over, over_tag = target, call.tag_of(target) or tag
    recording.tape.means.append(found)
    padding: Padding | None = recording.tape.padding
    if over is not None and padding is not None and padding.sizes:
        _refuse_padded(over, over_tag, out, found, padding, recording)


def _refuse_padded(
    t: Tensor, tag: Tag, out: Tensor, found: Mean, padding: Padding, recording: Recorder
) -> None:
    """Raise if a mean over `t` is over the columns of a padded batch. A size that a parameter has too
    is not told from that."""
    sizes = {n for d, n in enumerate(t.shape) if d != tag.dim and n not in out.shape} | {tag.step}
    own = {n for p in recording.tape.parameters.values() for n in p.shape}
    for size in sizes & padding.sizes - own:
        if not found.leaves_out() and padding.is_seen(size):
            raise ExamplesMixError(
                f"{recording.module_path()}: the mean is over {found.values} values of each example, "
                f"{size} columns among them, and the batch is padded to {size} columns, the length of "
                "its longest example. So that length divides the gradients of all others. Divide the "
                "sum of each example's own positions by their number, (losses * mask).sum(1) / "
                "mask.sum(1), or leave them out (labels of -100); or pad to a constant length. If this "
                "finding is wrong, pass self_check=False."
            )


def changed_mean(before: Sequence[Mean], now: Sequence[Mean]) -> tuple[int, int] | None:
    """(values before, values now) of the first mean that is over another number of values, where
    neither leaves any out."""
    for a, b in zip(before, now, strict=False):
        if a.values != b.values and not a.leaves_out() and not b.leaves_out():
            return a.values, b.values
    return None


def judge_sum(recording: Recorder, call: Call, state: Reduced, out: Tensor) -> State:
    """What the sum of losses that `call` makes is: mixed, if it leaves rows out by their place.

    ``losses[:4].sum()`` is the loss of other records once one is added or removed: the row that one of
    them leaves is taken by another. A mask picks rows by their own values, and each decides for itself.
    With a loader of the user's own a mask of labels is not told from a choice of places: neither is
    refused.
    """
    if not out.requires_grad:
        return recording.statistic(call.name)
    size, rows_of = recording.batch_size, recording.tape.rows
    if not recording.strict or not getattr(rows_of and rows_of[0], "handed_out", False):
        return state
    for t, tag in call.tagged:
        rows = tag.explicit
        if rows is None or tag.dim is None or is_sized(t):
            continue
        if len(set(rows)) == len(rows) < size and NOBODY not in rows:
            return Mixed(
                f"{recording.module_path()}: '{call.name}' adds up {len(rows)} of the {size} examples "
                "of the batch, picked by their place. Which records these are depends on who else is "
                "in it. Take the losses of all, and leave some out by their own values: by a mask or "
                "a weight."
            )
    return state
