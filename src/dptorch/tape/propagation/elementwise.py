"""Elementwise ops and casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dptorch.tape.propagation.table import FAMILIES, Found, agree, family, only_tag
from dptorch.tape.provenance.calls import Call, each_tensor, words
from dptorch.tape.provenance.tags import Lost, Tag, owners, regular_or_explicit

__all__ = ["along_broadcast", "elementwise", "refuse_positions"]

# Beside these, everything that torch tags as pointwise (`table.find`).
_ELEMENTWISE = words(
    """add sub rdiv pow gelu hardswish rrelu rrelu_with_noise softsign tanhshrink log_sigmoid
    log_sigmoid_forward dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d
    dropout2d dropout3d native_dropout _masked_scale bernoulli normal uniform exponential poisson
    binomial cauchy geometric log_normal random _standard_gamma _standard_gamma_grad rand_like
    randn_like zeros_like ones_like empty_like full_like randint_like equal isclose isreal lshift
    rshift contiguous detach float double half bfloat16 long int short bool char byte cpu cuda
    cfloat cdouble chalf masked_fill rsub
    fill zero alias real imag conj _conj resolve_conj resolve_neg _neg_view
    pin_memory _pin_memory lift lift_fresh float_power floor_divide polar complex view_as_complex
    _to_copy _prelu_kernel .data .real .imag to_dense special_expit clone"""
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


def refuse_positions(
    call: Call, tag: Tag, shape: Sequence[int], operands: Sequence[Tensor] | None = None
) -> None:
    """Where a row stands among irregular ones may depend on other examples, so a constant that
    differs from row to row may not enter. All operands are looked at unless some are named."""
    assert tag.dim is not None
    back = len(shape) - tag.dim
    for t in each_tensor(call.args, call.kwargs) if operands is None else operands:
        if call.tag_of(t) is None and t.dim() >= back and t.shape[-back] > 1:
            raise Lost("a constant with one row for each meets irregularly ordered examples")


for _name in _ELEMENTWISE:
    FAMILIES[_name] = elementwise


@family("to type type_as")
def first_operand(call: Call, outputs: Sequence[Any]) -> Found:
    """Casts: only the first operand's examples count."""
    return call.tag_of(call.first)


@family("copy")
def copy(call: Call, outputs: Sequence[Any]) -> Found:
    """``x.copy_(y)``: what x held is gone."""
    source = call.arg("src")
    tag = call.tag_of(source)
    if tag is None:  # constants: harmless wherever the examples were
        return call.tag_of(call.first)
    return along_broadcast(source, tag, outputs[0].shape)


@family("where")
def where(call: Call, outputs: Sequence[Any]) -> Found:
    """Selection; with the condition alone it is `nonzero`."""
    if len(call.bound) == 1:
        return nonzero(call, outputs)
    return elementwise(call, outputs)


@family("nonzero argwhere")
def nonzero(call: Call, outputs: Sequence[Any]) -> Found:
    """Positions of true elements: each belongs to the example of its element."""
    x, tag = call.tagged[0]
    assert tag.dim is not None
    table = (
        isinstance(outputs[0], Tensor) and call.name != "where" and not call.arg("as_tuple", False)
    )
    along = outputs[0][:, tag.dim] if table else outputs[tag.dim]
    # How many there are depends on all examples; whose each is does not, and that is all that is said.
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
        spread = tag is not None and tag.dim is not None
        found.append(along_broadcast(t, tag, out.shape) if tag is not None and spread else tag)
    return found


@family("bucketize isin searchsorted")
def looked_up(call: Call, outputs: Sequence[Any]) -> Found:
    """Values looked up in a constant row, each by itself."""
    values = {"isin": "elements", "searchsorted": "self"}.get(call.name, "input")
    x = call.arg(values, call.arg("input"))
    if call.name == "searchsorted":
        row, x = call.arg("sorted_sequence"), call.arg("self", call.arg("input"))
        if row.dim() > 1:
            tag = agree([tag for _, tag in call.tagged])
            if tag.dim is None or tag.dim >= row.dim() - 1 or len(call.tagged) < 2:
                raise Lost("the sorted rows and the values are not of the same examples")
            return tag
    return only_tag(call, x)
