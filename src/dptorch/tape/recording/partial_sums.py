"""Refuse a loss of some rows of the batch that were picked by their place.

``losses[:4].sum()`` is the loss of other records once one is added or removed: the row that one of them
leaves is taken by another. A mask picks rows by their own values, and each decides for itself. With
a loader of the user's own a mask of labels is not told from a choice of places: neither is refused.
"""

from __future__ import annotations

from torch import Tensor

from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import NOBODY, Mixed, Reduced, State
from dptorch.tape.recording.value_sizes import is_sized
from dptorch.tape.rules.recorder import Recorder

__all__ = ["judge_sum"]


def judge_sum(recording: Recorder, call: Call, state: Reduced, out: Tensor) -> State:
    """What the sum of losses that `call` makes is: mixed, if it leaves rows out by their place."""
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
