"""Tensors that were computed from parameters alone, where no recording looked on.

A model may return a parameter, or something made of one (the width of a decoder, a temperature), and
the loss takes its exponential first. That op touches no example, so nothing follows it; but autograd
wrote down where it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from dptorch.errors import warn
from dptorch.tape.provenance.tags import Mixed, State
from dptorch.tape.recording.attached import protected
from dptorch.tape.recording.taps import TAPS
from dptorch.tape.recording.tensor_states import GUESSED, TRAINED

__all__ = ["note_trained_beside", "parameters_behind"]

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
    for node in _nodes_behind(t):
        leaf = getattr(node, "variable", None)  # of AccumulateGrad
        if leaf is not None:
            if id(leaf) not in followed:
                return None
            found.add(id(leaf))
        if node is None or node.name() in _OF_EXAMPLES:
            return None
    return found or None


def _nodes_behind(t: Tensor) -> Iterator[Any]:
    """The nodes of autograd's graph that a gradient of `t` passes; None where they are too many."""
    nodes: list[Any] = [t.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node if len(seen) <= _MOST_NODES else None
        for behind, _ in node.next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                nodes.append(behind)


def note_trained_beside(loss: Tensor, mark: Callable[[Any, State], None]) -> None:
    """Note the parameters that a loss of the batch trains without protection: those of a model that has
    no engine. What is computed from them and reaches the private model is refused from now on.

    Args:
        mark: says what a tensor is.
    """
    own = protected()
    found = False
    for node in _nodes_behind(loss):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in own and not hasattr(leaf, GUESSED):
            mark(leaf, Mixed(_TRAINED))
            setattr(leaf, GUESSED, TRAINED)
            found = True
        if node is None:
            break
    if found:
        warn(
            "a model without an engine is trained on the batch of a private one. Nothing protects its "
            "parameters: keep them as private as the data. Its outputs may not enter the private "
            "model or its loss. Make an engine for it too, or train it on public data."
        )


_TRAINED = (
    "a value was computed with parameters that a model without an engine trains on the same data, "
    "without noise, so that it shows the examples of earlier steps. Make an engine for that model too, "
    "or train it on public data."
)
