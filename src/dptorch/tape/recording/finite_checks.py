"""Checks that everything is finite: reads that give the same for every ordinary batch.

``assert torch.isfinite(h).all()`` reads a value that all examples went into, but one that is True
unless an example is infinite or not a number. So the read is let through where it gives what it
gives for ordinary batches, and judged like any other where it does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["CHECKS", "is_check", "is_usual", "note_check"]

_USUAL = "_dptorch_usual"
_CHECKS = {"isfinite": True, "isnan": False, "isinf": False, "isposinf": False, "isneginf": False}
#: The ops that can be a part of such a check.
CHECKS = frozenset({*_CHECKS, "all", "any", "logical_not", "bitwise_not"})
_READS = ("__bool__", "item", "is_nonzero")


def note_check(name: str, first: Any, out: Any) -> None:
    """Note what one of `CHECKS`, or all or any of one, gives for an ordinary batch.

    Args:
        name: of the op.
        first: its operand; not `out`, if it works in place.
        out: its result.
    """
    if name in _CHECKS:
        usual = _CHECKS[name]
    else:
        before: bool | None = getattr(first, _USUAL, None)
        if before is None or (name == "all" and not before) or (name == "any" and before):
            return
        usual = before if name in ("all", "any") else not before
    if isinstance(out, Tensor) and out.dtype is torch.bool and out is not first:
        setattr(out, _USUAL, usual)


def is_check(t: Any) -> bool:
    """Whether a tensor says that values are finite, or that they are not."""
    return getattr(t, _USUAL, None) is not None


def is_usual(name: str, t: Any) -> bool:
    """Whether a read of `t` by `name` gives what it gives for every ordinary batch."""
    usual = getattr(t, _USUAL, None)
    if usual is None or name not in _READS:
        return False
    with torch._C.DisableTorchFunction():
        return t.numel() == 1 and bool(t) == usual and t._version == 0
