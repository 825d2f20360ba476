"""Elementwise ops and casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dptorch.tape.propagation.table import FAMILIES, Found, agree, family
from dptorch.tape.provenance.calls import Call, each_tensor, words
from dptorch.tape.provenance.tags import Lost, Tag, owners, regular_or_explicit

__all__ = ["along_broadcast", "elementwise", "refuse_positions"]

_ELEMENTWISE = words(
    """add sub mul div rdiv pow neg abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square
    reciprocal sin cos tan asin acos atan atan2 sinh cosh tanh asinh acosh atanh sigmoid erf
    erfc erfinv lgamma digamma floor ceil round trunc frac sign sgn clamp clip clamp_min
    clamp_max maximum minimum fmax fmin fmod remainder floor_divide where masked_fill lerp
    addcmul addcdiv hypot logaddexp nan_to_num copysign relu relu6 gelu silu mish elu selu
    celu leaky_relu rrelu hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink
    softplus softsign logsigmoid threshold logit sinc xlogy heaviside rsub dropout
    alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d
    native_dropout bernoulli normal uniform exponential rand_like randn_like zeros_like
    ones_like empty_like full_like randint_like eq ne lt le gt ge equal isnan isinf isfinite
    isclose logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_xor
    bitwise_not lshift rshift clone contiguous detach float double half bfloat16 long int
    short bool char byte cpu cuda cfloat fill zero positive alias real imag conj angle
    pin_memory polygamma i0 ldexp nextafter float_power polar view_as_complex special_expit
    special_erf .data .real .imag"""
)


def along_broadcast(t: Tensor, tag: Tag, shape: Sequence[int]) -> Tag:
    """The tag of an operand after it is broadcast to `shape`.

    Raises:
        Lost: if its example dimension is stretched.
    """
    assert tag.dim is not None
    dim = tag.dim - t.dim() + len(shape)
    if dim < 0 or t.shape[tag.dim] != shape[dim]:
        raise Lost("an operand is broadcast along its examples")
    return tag if dim == tag.dim else tag.at(dim)


def elementwise(call: Call, outputs: Sequence[Any]) -> Found:
    """Broadcasting ops: the examples stay where they are, counted from the last dimension."""
    out = outputs[0]
    if not isinstance(out, Tensor):
        return None
    shape = out.shape
    tag = agree(
        [tag if t.shape == shape else along_broadcast(t, tag, shape) for t, tag in call.tagged]
    )
    if tag.explicit is not None:
        refuse_positions(call, tag, shape)
    return tag


def refuse_positions(call: Call, tag: Tag, shape: Sequence[int]) -> None:
    """Where a row stands among irregular ones may depend on other examples, so a constant that
    differs from row to row may not enter."""
    assert tag.dim is not None
    back = len(shape) - tag.dim
    for t in each_tensor(call.args, call.kwargs):
        if call.tag_of(t) is None and t.dim() >= back and t.shape[-back] > 1:
            raise Lost("a constant with one row for each meets irregularly ordered examples")


for _name in _ELEMENTWISE:
    FAMILIES[_name] = elementwise


@family("to type type_as")
def first_operand(call: Call, outputs: Sequence[Any]) -> Found:
    """Casts: only the first operand's examples count."""
    return call.tag_of(call.args[0])


@family("copy")
def copy(call: Call, outputs: Sequence[Any]) -> Found:
    """``x.copy_(y)``: what x held is gone."""
    source = call.arg(1, "src")
    tag = call.tag_of(source)
    if tag is None:  # constants: harmless wherever the examples were
        return call.tag_of(call.args[0])
    return along_broadcast(source, tag, outputs[0].shape)


@family("where")
def where(call: Call, outputs: Sequence[Any]) -> Found:
    """Selection; with the condition alone it is `nonzero`."""
    if len(call.args) == 1 and not call.kwargs:
        return nonzero(call, outputs)
    return elementwise(call, outputs)


@family("nonzero argwhere")
def nonzero(call: Call, outputs: Sequence[Any]) -> Found:
    """Positions of true elements: each belongs to the example of its element."""
    x, tag = call.tagged[0]
    assert tag.dim is not None
    table = call.name != "where" and not call.kwargs.get("as_tuple", False) and len(call.args) == 1
    along = outputs[0][:, tag.dim] if table else outputs[tag.dim]
    owner = owners(tag, x.shape[tag.dim], call.batch_size, x.device)[along]
    return regular_or_explicit(owner, 0, call.batch_size, tag.step)


@family("tril triu")
def triangle(call: Call, outputs: Sequence[Any]) -> Found:
    """Zeros above or below the diagonal of the last two dimensions."""
    return elementwise(call, outputs)


@family("broadcast_tensors")
def broadcast_tensors(call: Call, outputs: Sequence[Any]) -> list[Found]:
    """Each operand expanded."""
    operands = call.args[0] if isinstance(call.args[0], (list, tuple)) else call.args
    found: list[Found] = []
    for t, out in zip(operands, outputs, strict=True):
        tag = call.tag_of(t)
        found.append(None if tag is None else along_broadcast(t, tag, out.shape))
    return found
