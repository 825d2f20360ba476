"""Refuse what is trained beside the model, where its gradient would have no protection.

Autograd goes on behind the model's inputs. A tensor that an input with rows of the batch was computed
from (a learned prompt that is added to the images, an encoder) would get the plain gradient of all
examples, and so would a tensor without examples that meets the batch in the model or in the loss.
What a generator makes from noise has no rows of the batch in it: its gradient comes from the model
alone.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dptorch.errors import NotCoveredError
from dptorch.tape.recording.batches import Batch
from dptorch.tape.recording.tensor_states import TensorStates, batch_of

__all__ = ["refuse_leaf", "refuse_not_followed", "refuse_trained_in_front"]

_LEAF = "torch::autograd::AccumulateGrad"


def refuse_trained_in_front(t: Tensor) -> None:
    """Raise if a gradient that reaches an input of the model goes on to more than rows of its batch.

    Rows are followed from the engine's loader, or from the model, that they went through before. An
    input that holds none that are known is not looked at.

    Args:
        t: the input, as the loop gives it.

    Raises:
        NotCoveredError: for a tensor that is no rows of the batch and requires grad.

    Guarantees:
        Nothing in front of the model gets a gradient of the rows of the engine's loader without
        noise. Held by ``test_what_is_trained_in_front_of_the_model_is_refused``.
    """
    batch = batch_of(t)
    if batch is None or not t.requires_grad:
        return
    with torch._C.DisableTorchFunction():
        node = t.grad_fn
    for leaf in [] if node is None else _leaves(node):
        if not _is_of_rows(leaf, t, batch):
            raise NotCoveredError(
                f"an input of the model, of shape {tuple(t.shape)}, was computed from rows of the "
                f"batch and from a tensor of shape {tuple(leaf.shape)} that requires grad, in front "
                "of the model. The gradient of that tensor would be of all examples, without noise. "
                "Put it into the module that the engine is made for, or detach() the input; make a "
                "perturbation of each row with torch.zeros_like(x), anew for each batch."
            )


def refuse_leaf(states: TensorStates, name: str, t: Tensor) -> None:
    """Raise if a leaf that requires grad, of which nothing is known, is no tensor of rows.

    Args:
        states: of the recording in which it meets the batch.
        name: of the op.
        t: no parameter of any module.

    Raises:
        NotCoveredError: its gradient would be of all examples, without noise.
    """
    batch = states.batch
    rows = t.dim() > 0 and t.shape[0] == batch.size and not batch.handed_out
    if rows or not t.numel():
        return
    raise NotCoveredError(
        f"{states.module_path()}: '{name}' takes values of the batch and a tensor of shape "
        f"{tuple(t.shape)} that requires grad and is no parameter of the model. Its gradient would be "
        "of all examples, without noise. Make it an nn.Parameter of the module that the engine is made "
        "for, or detach() it; make a perturbation of each row with torch.zeros_like(x)."
    )


def refuse_not_followed(states: TensorStates, name: str, t: Tensor) -> NoReturn:
    """Raise for a tensor that requires grad and that the recording of its use knows nothing of.

    Args:
        states: of the recording.
        name: of the op.
        t: a parameter, or no leaf.
    """
    shape = tuple(t.shape)
    if isinstance(t, nn.Parameter):
        raise NotCoveredError(
            f"{states.module_path()}: '{name}' uses a trainable parameter of shape {shape} that is not "
            "followed: it was unfrozen, replaced or added after the engine was made, or belongs to "
            "another module (a loss with parameters, a separate head). Its gradient would have no "
            "protection. Freeze it with requires_grad_(False), or make one module that holds "
            "everything that is trained, and the engine after it."
        )
    raise NotCoveredError(
        f"{states.module_path()}: '{name}' uses a tensor of shape {shape} that requires grad "
        f"({t.grad_fn}) and was not computed in this forward pass from the inputs or the parameters "
        "seen so far. If it is a cached value, compute it in forward; if it is an input, pass it as an "
        "argument of the model; if it is a constant, detach it; if it is a penalty on the parameters, "
        "use the optimizer's weight_decay."
    )


def _is_of_rows(leaf: Tensor, t: Tensor, batch: Batch) -> bool:
    """Whether the gradient of a leaf has the examples of `batch` apart."""
    if isinstance(leaf, nn.Parameter):
        return False
    of = batch_of(leaf)
    if of is None:  # what a loop makes from rows of its own loader, which nothing follows
        return not batch.handed_out and leaf.shape == t.shape
    return of.origin()[0] is batch.origin()[0] or not batch.handed_out


def _leaves(root: Any) -> list[Tensor]:
    """The leaves that a backward from `root` gives gradients to, but for those of taps."""
    found: list[Tensor] = []
    nodes = [root]
    seen = {root}
    while nodes:
        node = nodes.pop()
        if node.name() == _LEAF and node.variable.numel():  # a tap's is empty
            found.append(node.variable)
        for behind, _ in node.next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                nodes.append(behind)
    return found
