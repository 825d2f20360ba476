"""Linear layers in every spelling: F.linear, addmm, matmul, ``@``, bmm, einsum.

All of them are one contraction of an activation with a parameter. Written with index letters,

    out[o...] = sum x[x...] * w[w...]     gives     grad_b[w...] = sum x_b[x...] * g_b[o...]

and the letters say what is a position, an input and an output.

Shape legend: B examples, m positions folded into the batch dimension, T positions, P outputs,
D inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.tape.gradients import Dense, Outer, PerExampleGradient
from dptorch.tape.propagation.products import einsum_operands, expand_einsum
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Tag, rows
from dptorch.tape.rules.recorder import Recorder
from dptorch.tape.rules.registry import detached, rule

Pairs = Iterator[tuple[Tensor, PerExampleGradient]]


@rule("linear")
def linear(call: Call, recording: Recorder) -> Any:
    """``x @ w.T + b`` for x of any rank."""
    x, w, b = call.arg("input"), call.arg("weight"), call.arg("bias")
    tag = call.tag_of(x)
    # Where the examples are the features, each output adds them up: no rule can part them again.
    if tag is None or tag.dim == x.dim() - 1 or len(call.tagged) > 1:
        return NotImplemented
    if w.dim() != 2:
        return NotImplemented
    out = call.func(x, detached(w), detached(b))
    return _affine(call, recording, out, tag, x, w, b, out_first=True)


@rule("addmm")
def addmm(call: Call, recording: Recorder) -> Any:
    """``b + x @ w``, as Hugging Face's Conv1D calls it."""
    b, x, w = call.operands()
    tag = call.tag_of(x)
    scaled = call.arg("beta", 1) != 1 or call.arg("alpha", 1) != 1
    if tag is None or tag.dim == 1 or len(call.tagged) > 1 or scaled:
        return NotImplemented
    if b.dim() > 1:
        return NotImplemented
    out = call.func(detached(b), x, detached(w))
    return _affine(call, recording, out, tag, x, w, b, out_first=False)


def _affine(
    call: Call,
    recording: Recorder,
    out: Tensor,
    tag: Tag,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    *,
    out_first: bool,
) -> Any:
    n = call.batch_size
    want_w, want_b = call.is_parameter(w), b is not None and call.is_parameter(b)
    weight, flipped = recording.untransposed(w)
    out_first = out_first != flipped

    def gradients(grads: Sequence[Tensor | None], saved: Sequence[Tensor]) -> Pairs:
        assert grads[0] is not None
        g_BTP = rows(grads[0], tag, n).flatten(1, -2)
        if want_w:
            x_BTD = rows(saved[0], tag, n).flatten(1, -2)
            left, right = (g_BTP, x_BTD) if out_first else (x_BTD, g_BTP)
            yield weight, Outer(left, right, weight.shape)
        if want_b:
            assert b is not None
            summed = _sum_over_positions(g_BTP)
            yield b, Dense(summed.sum(1, keepdim=True) if b.shape[-1:] == (1,) else summed)

    return recording.tap(call, out, [tag], (x.detach(),) if want_w else (), gradients)


@rule("bilinear")
def bilinear(call: Call, recording: Recorder) -> Any:
    """``x1 @ W @ x2 + b``: a linear layer on the outer products of its two inputs."""
    x1, x2 = call.arg("input1"), call.arg("input2")
    w, b = call.arg("weight"), call.arg("bias")
    tags = [call.tag_of(x1), call.tag_of(x2)]
    tag = tags[0] or tags[1]
    if tag is None or any(t is not None and t != tag for t in tags):
        return NotImplemented
    if tag.dim == x1.dim() - 1 or call.is_parameter(x1) or call.is_parameter(x2):
        return NotImplemented
    n = call.batch_size
    want_w, want_b = call.is_parameter(w), b is not None and call.is_parameter(b)
    out = call.run({id(p): p.detach() for p in call.parameters})

    def gradients(grads: Sequence[Tensor | None], saved: Sequence[Tensor]) -> Pairs:
        assert grads[0] is not None
        g_BTP = rows(grads[0], tag, n).flatten(1, -2)
        if want_w:
            x_BTD, y_BTE = (rows(x, tag, n).flatten(1, -2) for x in saved)
            products = (x_BTD[..., :, None] * y_BTE[..., None, :]).flatten(2)
            yield w, Outer(g_BTP, products, w.shape)
        if want_b:
            assert b is not None
            yield b, Dense(_sum_over_positions(g_BTP))

    saved = (x1.detach(), x2.detach()) if want_w else ()
    return recording.tap(call, out, [tag], saved, gradients)


def _sum_over_positions(g_BTP: Tensor) -> Tensor:
    """[B, P]; of one position the memory that the weight's factor is kept in anyway."""
    if g_BTP.shape[1] == 1:
        return g_BTP[:, 0]
    return g_BTP.sum(1, dtype=_sum_dtype(g_BTP))


def _sum_dtype(t: Tensor) -> torch.dtype:
    # In half precision a sum over many positions would stop growing.
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@rule("matmul mm bmm mv __rmatmul__")
def matmul(call: Call, recording: Recorder) -> Any:
    """Matrix products with the parameter on either side."""
    a, b = call.operands()
    if call.name == "__rmatmul__":
        a, b = b, a
    batch = max(a.dim(), b.dim(), 2) - 2
    left = ("ABCDEFGH"[batch - (a.dim() - 2) : batch] + "ik") if a.dim() > 1 else "k"
    right = ("ABCDEFGH"[batch - (b.dim() - 2) : batch] + "kj") if b.dim() > 1 else "k"
    lead = "ABCDEFGH"[batch - max(a.dim() - 2, b.dim() - 2, 0) : batch]
    result = lead + ("i" if a.dim() > 1 else "") + ("j" if b.dim() > 1 else "")
    if call.is_parameter(a):
        return _contract(call, recording, b, right, a, left, result)
    return _contract(call, recording, a, left, b, right, result)


@rule("einsum")
def einsum(call: Call, recording: Recorder) -> Any:
    """Two operands, one of them the parameter."""
    equation, operands = einsum_operands(call)
    if len(operands) != 2 or len(call.parameters) != 1:
        return NotImplemented
    letters, result = expand_einsum(equation, operands)
    p = next(i for i in (0, 1) if call.is_parameter(operands[i]))
    return _contract(
        call, recording, operands[1 - p], letters[1 - p], operands[p], letters[p], result
    )


def _contract(
    call: Call,
    recording: Recorder,
    x: Tensor,
    x_letters: str,
    w: Tensor,
    w_letters: str,
    out_letters: str,
) -> Any:
    tag = call.tag_of(x)
    if tag is None or len(call.tagged) > 1:
        return NotImplemented
    if len(set(x_letters)) < len(x_letters) or len(set(w_letters)) < len(w_letters):
        return NotImplemented  # a diagonal
    # A batch letter of size one broadcasts; leave it to the generic rule.
    sizes: dict[str, int] = {}
    for letters, t in ((x_letters, x), (w_letters, w)):
        for letter, size in zip(letters, t.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                return NotImplemented
    batch_letter = "" if tag.dim is None else x_letters[tag.dim]
    if batch_letter and (batch_letter not in out_letters or batch_letter in w_letters):
        return NotImplemented
    if not set(w_letters) <= set(x_letters) | set(out_letters):
        return NotImplemented
    if not set(x_letters) <= set(w_letters) | set(out_letters):
        return NotImplemented
    out = call.run({id(w): w.detach()})
    out_tag = tag if tag.dim is None else tag.at(out_letters.index(batch_letter))
    n = call.batch_size
    x_rest = x_letters.replace(batch_letter, "") if batch_letter else x_letters
    o_rest = out_letters.replace(batch_letter, "") if batch_letter else out_letters
    factored = _factor(w_letters, x_rest, o_rest)
    weight, flipped = recording.untransposed(w)

    def gradients(grads: Sequence[Tensor | None], saved: Sequence[Tensor]) -> Pairs:
        assert grads[0] is not None
        g_Bm = rows(grads[0], out_tag, n)  # [B, m, *o_rest]
        x_Bm = rows(saved[0], tag, n)  # [B, m, *x_rest]
        if factored is None:
            formed = torch.einsum(f"YZ{x_rest},YZ{o_rest}->Y{w_letters}", x_Bm.to(g_Bm.dtype), g_Bm)
            yield w, Dense(formed)
            return
        first_is_out, first, second = factored
        shared = [c for c in x_rest if c in o_rest]
        sides = []
        for kept, t, own in (
            (first, g_Bm if first_is_out else x_Bm, o_rest if first_is_out else x_rest),
            (second, x_Bm if first_is_out else g_Bm, x_rest if first_is_out else o_rest),
        ):
            order = [0, 1] + [2 + own.index(c) for c in shared] + [2 + own.index(c) for c in kept]
            moved = t.permute(order)
            width = math.prod(moved.shape[2 + len(shared) :])
            sides.append(moved.reshape(n, -1, width))
        left, right = (sides[1], sides[0]) if flipped else (sides[0], sides[1])
        yield weight, Outer(left, right, weight.shape)

    return recording.tap(call, out, [out_tag], (x.detach(),), gradients)


def _factor(w: str, x: str, out: str) -> tuple[bool, str, str] | None:
    """Split the parameter's letters into those of the output and those of the input, if they are
    two runs: (first run is the output's, first run, second run)."""
    # A letter of both sides, or of none, is no input and no output: no product of two factors.
    if any((c in x) == (c in out) for c in w):
        return None
    for first_is_out in (True, False):
        own = out if first_is_out else x
        first = "".join(c for c in w if c in own)
        second = "".join(c for c in w if c not in own)
        if first + second == w:
            return first_is_out, first, second
    return None
