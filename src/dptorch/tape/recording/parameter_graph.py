"""Tensors that were computed from parameters alone, where no recording looked on.

A model may return a parameter, or something made of one (the width of a decoder, a temperature), and
the loss takes its exponential first. That op touches no example, so nothing follows it; but autograd
wrote down where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dptorch.errors import warn
from dptorch.tape.recording.attached import protected
from dptorch.tape.recording.batches import Batch
from dptorch.tape.recording.taps import TAPS
from dptorch.tape.recording.tensor_states import GUESSED, TRAINED, TensorStates, batch_of
from dptorch.tape.rules.recorder import Recorder

__all__ = ["marked_for_hooks", "note_leaves", "note_trained_beside", "parameters_behind"]

_MOST_NODES = 100_000
_OF_EXAMPLES = tuple(f"{cls.__name__}Backward" for cls in TAPS)


def parameters_behind(
    t: Tensor, followed: Mapping[int, str], states: TensorStates
) -> set[int] | None:
    """The ids of the followed parameters that `t` was computed from.

    Args:
        t: a tensor that requires grad and is no leaf.
        followed: names of the followed parameters, by ``id``.
        states: of the recording, which know the leaves that the forward pass has made itself.

    Returns:
        None if anything else that requires grad is behind it: an input, a parameter that is not
        followed, or a recorded value of the batch. None of them if only leaves of the forward pass are.
    """
    found: set[int] = set()
    for node in _nodes_behind(t):
        leaf = getattr(node, "variable", None)  # of AccumulateGrad
        if leaf is not None and not states.is_own_leaf(leaf):
            if id(leaf) not in followed:
                return None
            found.add(id(leaf))
        if node is None or node.name() in _OF_EXAMPLES:
            return None
    if not found:
        states.note_own_leaf(t)
    return found


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


def note_trained_beside(loss: Tensor, recording: Recorder) -> Sequence[Tensor]:
    """Note what a loss of the batch trains without protection: parameters of a model without an engine,
    and other leaves. What is computed from them and reaches the private model, in this step or in a
    later one, is refused. Returns them.

    Rows of the batch, and perturbations that are made of them, have a tag of their own and may be used.
    """
    own, batch = protected(), batch_of(loss)
    found = []
    for node in _nodes_behind(loss):
        if node is None:
            break
        leaf = getattr(node, "variable", None)
        if leaf is None or id(leaf) in own or hasattr(leaf, GUESSED) or not leaf.numel():
            continue
        if not _is_of_rows(leaf, batch):
            found.append(leaf)
    note_leaves(found, recording)
    return found


@contextmanager
def marked_for_hooks(leaves: Sequence[Tensor], recording: Recorder) -> Iterator[None]:
    """Mark the gradients of `leaves` before hooks of the user's own get them, in one backward.

    Guarantees:
        What a hook keeps of such a gradient may not reach the private model. Held by
        `test_what_hooks_keep_of_a_gradient_is_refused`.
    """

    def mark(found: Tensor) -> None:
        recording.mark(found, TRAINED)

    def mark_kept(leaf: Tensor) -> None:
        if leaf.grad is not None:
            mark(leaf.grad)

    ways = (
        ("_backward_hooks", "register_hook", mark),
        ("_post_accumulate_grad_hooks", "register_post_accumulate_grad_hook", mark_kept),
    )
    handles = []
    for leaf in leaves:
        for theirs, register, hook in ways:
            if hooks := getattr(leaf, theirs, None):
                handles.append(getattr(leaf, register)(hook))
                hooks.move_to_end(handles[-1].id, last=False)  # they run in the order of the dict
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def note_leaves(leaves: Iterable[Tensor], recording: Recorder) -> None:
    """Note that leaves of which nothing is known get gradients that show examples, and warn."""
    found = [leaf for leaf in leaves if batch_of(leaf) is None]
    for leaf in found:
        recording.note_trained(leaf)
    if found:
        warn(
            "a model without an engine is trained on the batch of a private one. Nothing protects its "
            "parameters: keep them as private as the data. Its outputs may not enter the private "
            "model or its loss. Make an engine for it too, or train it on public data."
        )


def _is_of_rows(leaf: Tensor, batch: Batch | None) -> bool:
    """Whether a leaf of unknown origin is taken for one perturbation of each row."""
    if isinstance(leaf, nn.Parameter) or batch is None or batch.handed_out:
        return False
    return leaf.dim() > 0 and leaf.shape[0] == batch.size
