"""Take a tensor of unknown origin for rows of the batch where it meets the batch in a loss.

With the engine's loader a tensor may have come back from where nothing is followed (NumPy, lists,
copies); it is known by its values. With one of the user's own nobody says which tensors hold rows of
the batch. One that has as many rows and is paired with them, row by row, is taken for the batch's
own, and so is one whose rows would all be paired with every example, and so are the targets of rows
that were selected. What looks like a constant stays one: a parameter or buffer, a tensor seen with an
earlier batch, one that fits along another dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dptorch.errors import warn
from dptorch.tape.propagation import FAMILIES
from dptorch.tape.propagation.elementwise import elementwise
from dptorch.tape.provenance.calls import words
from dptorch.tape.provenance.tags import Mixed, Tag
from dptorch.tape.recording.places import user_line
from dptorch.tape.recording.tensor_states import GUESSED, TensorStates, batch_of

__all__ = ["rows_of_unknown", "warn_of_array"]

_ARRAY = (
    "{line}: a tensor of shape {shape}, whose origin is not known, enters the loss, and values of the "
    "batch went to NumPy or a list before. If it was computed from them, it is taken to keep the "
    "examples apart, which nothing checks: weights over their sum do not. Compute with tensors of "
    "torch, which are followed."
)
_warned: set[str] = set()
_LOSSES = words(
    """mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div poisson_nll_loss
    binary_cross_entropy_with_logits soft_margin_loss cosine_similarity pairwise_distance copy
    """
)
_PRODUCTS = words("""matmul mm __matmul__""")
_ROW_LOSSES = words("""cross_entropy nll_loss multi_margin_loss""")


def rows_of_unknown(
    states: TensorStates, name: str, tensors: Sequence[Tensor], tagged: Sequence[tuple[Tensor, Tag]]
) -> tuple[list[tuple[Tensor, Tag]], Mixed | None]:
    """Return the operands that are taken for rows of the batch, with their tags, and mark them.

    One of them may be a mixed tensor that has come back; then return what it is.
    """
    batch = states.batch
    if batch.size < 2 or (batch.handed_out and not batch.left):
        return [], None
    first, tag = tagged[0]
    if tag.dim is None:
        return [], None
    found = []
    for t in tensors:
        if states.state(t) is not None or batch_of(t) is not None or _is_constant(states, t):
            continue
        mine = _tag(name, t, first, tag, batch.size)
        if mine is None:
            continue
        before = batch.came_back(t.T if mine == Tag(1) else t) if batch.left else None
        if isinstance(before, Mixed):
            return [], before
        if before is not None or not batch.handed_out:
            setattr(t, GUESSED, "loss")
            states.mark(t, mine)
            found.append((t, mine))
        elif batch.left:
            warn_of_array(t)
    return found, None


def warn_of_array(t: Tensor) -> None:
    """Warn, once for each line, that a tensor of unknown origin enters the loss after values of the
    batch have left for where nothing is followed."""
    line = user_line()
    if t.is_floating_point() and line not in _warned:
        _warned.add(line)
        warn(_ARRAY.format(line=line, shape=tuple(t.shape)))


def _tag(name: str, t: Tensor, first: Tensor, tag: Tag, size: int) -> Tag | None:
    assert tag.dim is not None
    if name in _PRODUCTS:  # q @ k.T: one column for each row of k
        transposed = t.dim() == 2 and t.shape[1] == size and t.stride(0) == 1 and t.stride(1) > 1
        return Tag(1) if transposed and t._base is not None and t.shape[0] > 1 else None
    selected = tag.explicit is not None and tag.dim == 0  # its own rows, by a mask or by indices
    mine = Tag(0, 1, tag.explicit) if selected else Tag(0)
    if not t.dim() or t.shape[0] != (len(tag.explicit or ()) if selected else size):
        return None
    if name in _ROW_LOSSES:
        aligned = tag == mine and t.dim() in (first.dim() - 1, first.dim())
        return mine if aligned and not t.is_floating_point() else None
    if FAMILIES.get(name) is not elementwise and name not in _LOSSES:
        return None
    place = first.dim() - t.dim()  # of dimension 0 of t among those of the first operand
    if place == tag.dim or place < 0 or first.shape[place] == 1:
        return mine
    return None  # as many columns as rows: class weights, for instance


def _is_constant(states: TensorStates, t: Tensor) -> bool:
    """Whether a tensor is a parameter or a buffer, or needs a gradient."""
    if t.requires_grad or isinstance(t, nn.Parameter) or hasattr(t, GUESSED):
        return True
    if isinstance(t, getattr(torch.nn, "Buffer", ())):
        return True
    return any(t is b for b in states.model.buffers())
