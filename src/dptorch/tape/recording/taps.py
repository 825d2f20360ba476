"""The autograd functions by which the tape sees gradients: a tap on an output, a lifted parameter, and
an op whose backward is written out.

The first two are identities for the model. Their `handle` is an empty tensor that requires grad, so
that the first layer of a model, whose input does not, is seen as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dptorch.errors import NotCoveredError
from dptorch.tape.provenance.tags import Tag, place, rows, separate
from dptorch.tape.rules.recorder import WrittenOut

__all__ = ["TAPS", "full_precision", "lift", "reduce_to", "tap", "tap_inside"]

# Called in the backward with the outputs' gradients and the saved tensors.
OnGradient = Callable[[Sequence[Tensor | None], Sequence[Tensor]], None]


def _refuse_second_derivatives() -> None:
    """What follows in a backward runs without gradients."""
    if torch.is_grad_enabled():
        raise NotCoveredError(
            "a backward with create_graph=True went through the recorded model: the tape does not "
            "follow second derivatives."
        )


def full_precision() -> AbstractContextManager[None]:
    """Norms, factors and sums are computed in float32 at least, whatever autocast says."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return _without_autocast()
    return nullcontext()


@contextmanager
def _without_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


class _Tap(Function):
    @staticmethod
    def forward(
        ctx: Any, on_gradient: OnGradient, handle: Tensor, n_outputs: int, *tensors: Tensor
    ) -> Any:
        saved = tensors[n_outputs:]
        ctx.on_gradient = on_gradient
        ctx.n_saved = len(saved)
        ctx.set_materialize_grads(False)
        # Through save_for_backward, so that a later in-place change of an input raises instead of
        # corrupting the gradient, and so that activation checkpointing can free it.
        ctx.save_for_backward(*saved)
        if n_outputs == 1:
            return tensors[0].detach()
        return tuple(o.detach() for o in tensors[:n_outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _refuse_second_derivatives()
        saved = (
            ctx.saved_tensors
        )  # before anything is disabled: it may run a checkpoint's recompute
        if grads[0] is not None or any(g is not None for g in grads):
            with torch._C.DisableTorchFunction(), full_precision():
                ctx.on_gradient(grads, saved)
        return (None, None, None, *grads, *([None] * ctx.n_saved))


def tap(
    outputs: Sequence[Tensor], saved: Sequence[Tensor], handle: Tensor, on_gradient: OnGradient
) -> tuple[Tensor, ...]:
    """Pass `outputs` on unchanged; call ``on_gradient(grads, saved)`` when their gradients arrive.

    A gradient is None for an output that nothing used.
    """
    passed = _apply_tap(on_gradient, handle, len(outputs), *outputs, *saved)
    return passed if isinstance(passed, tuple) else (passed,)


class _Lift(Function):
    @staticmethod
    def forward(
        ctx: Any,
        on_gradient: Callable[[Tensor], None],
        box: tuple[Tensor],
        handle: Tensor,
        shape: Sequence[int],
    ) -> Tensor:
        ctx.on_gradient = on_gradient
        return box[0].detach().expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _refuse_second_derivatives()
        with torch._C.DisableTorchFunction(), full_precision():
            ctx.on_gradient(grads[0])
        return None, None, None, None


def lift(
    parameter: Tensor, shape: Sequence[int], handle: Tensor, on_gradient: Callable[[Tensor], None]
) -> Tensor:
    """`parameter` expanded to `shape`; its gradient arrives un-reduced, of that shape.

    The parameter goes in boxed: as a tensor argument even its None gradient would walk the graph of
    a param-only tensor, and free it.
    """
    lifted: Tensor = _apply_lift(on_gradient, (parameter,), handle, tuple(shape))
    return lifted


class _Inside(Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: WrittenOut,
        on_gradient: Callable[[Any], None],
        handle: Tensor,
        *inputs: Tensor,
    ) -> Any:
        ctx.op, ctx.on_gradient = op, on_gradient
        ctx.set_materialize_grads(False)
        with full_precision():
            outputs, saved = op.forward(*inputs)
        ctx.n_saved = len(saved)
        ctx.save_for_backward(*saved, *op.tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _refuse_second_derivatives()
        saved = ctx.saved_tensors[: ctx.n_saved]  # raises where any was written to
        with torch._C.DisableTorchFunction(), full_precision():
            found, inner = ctx.op.backward(grads, saved, wants_inputs=ctx.needs_input_grad[3])
            ctx.on_gradient(inner)
        return None, None, None, *found


def tap_inside(
    op: WrittenOut, inputs: Sequence[Tensor], handle: Tensor, on_gradient: Callable[[Any], None]
) -> tuple[Tensor, ...]:
    """Run `op`; call ``on_gradient`` in the backward with the gradients that are inside it."""
    outputs: tuple[Tensor, ...] = _apply_inside(op, on_gradient, handle, *inputs)
    return outputs


def _apply_of(cls: type[Function]) -> Callable[..., Any]:
    """``cls.apply``, bound before a recording patches it, without what it does for functorch: that
    takes as long as all the rest, at every site."""
    complete: Callable[..., Any] = cls.apply
    plain: Callable[..., Any] = super(Function, cls).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return complete(*args)  # refuses
        return plain(*args)

    return apply


_apply_tap = _apply_of(_Tap)
_apply_lift = _apply_of(_Lift)
_apply_inside = _apply_of(_Inside)
TAPS = (_Tap, _Lift, _Inside)


def reduce_to(g: Tensor, shape: torch.Size, tag: Tag, n: int) -> Tensor:
    """The gradient of a lifted copy -> one gradient of the parameter's `shape` for each example."""
    if tag.dim is None:
        return place(g.sum_to_size(shape), tag.step, n)
    own_dim = tag.dim - (g.dim() - len(shape))
    if own_dim >= 0 and shape[own_dim] != 1:  # the parameter itself spans the batch
        reduced = g.sum_to_size([*shape])
        return separate(reduced, tag.at(own_dim), n)
    if tag.explicit is not None:
        each = separate(g, tag, n)
        return torch.stack([e.sum_to_size(shape) for e in each])
    by_example = rows(g, tag, n)  # [B, m, rest without the batch dimension]
    by_example = by_example.sum(1).unsqueeze(tag.dim + 1)
    full = [1] * (g.dim() - len(shape)) + list(shape)
    dims = [i + 1 for i in range(g.dim()) if full[i] == 1 and by_example.shape[i + 1] != 1]
    if dims:
        by_example = by_example.sum(dims, keepdim=True)
    return by_example.reshape(n, *shape)
