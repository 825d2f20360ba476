"""Tensors that were computed from parameters alone, where no recording looked on.

A model may return a parameter, or something made of one (the width of a decoder, a temperature), and
the loss takes its exponential first. That op touches no example, so nothing follows it; but autograd
wrote down where it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dptorch.tape.recording.taps import TAPS

__all__ = ["parameters_behind"]

_MOST_NODES = 100_000
_OF_EXAMPLES = tuple(f"{cls.__name__}Backward" for cls in TAPS)


def parameters_behind(t: Tensor, followed: Mapping[int, str]) -> set[int] | None:
    """The ids of the followed parameters that `t` was computed from.

    Args:
        t: a tensor that requires grad and is no leaf.
        followed: names of the followed parameters, by ``id``.

    Returns:
        None if anything else that requires grad is behind it: an input, a parameter that is not
        followed, or a recorded value of the batch.
    """
    found: set[int] = set()
    nodes: list[Any] = [t.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)  # of AccumulateGrad
        if leaf is not None:
            if id(leaf) not in followed:
                return None
            found.add(id(leaf))
        if node.name() in _OF_EXAMPLES or len(seen) > _MOST_NODES:
            return None
        for behind, _ in node.next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                nodes.append(behind)
    return found or None
