"""One layer of a recurrent network in one direction, and its gradients, by formulas written out.

torch's own layer hands out the gradients of its weights summed over the batch. Here the gradients at
the gates are handed out, before they meet the weights: from them and what the weights were multiplied
by follows each example's gradient. A layer costs what torch's does: one product with all inputs, and
for each time step one with the state, forwards and backwards.

Rows of all time steps lie one after another, as in a PackedSequence: step t has `counts[t]` of them,
those of the first sequences. Sequences of one length are the case in which all counts are equal.

Shape legend: N rows of all steps, S sequences, D inputs, H hidden, P outputs (H without a projection),
G gates times H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CELLS", "Inner", "Layer", "Weights"]

# grad · y (1 - y) and grad · (1 - y²), each in one pass over memory.
_sigmoid_gradient = torch.ops.aten.sigmoid_backward
_tanh_gradient = torch.ops.aten.tanh_backward


class Weights(NamedTuple):
    """Of one layer in one direction, with torch's order of the gates.

    Attributes:
        inputs: [G, D].
        states: [G, P].
        input_bias, state_bias: [G], or None.
        projection: [P, H], or None.
    """

    inputs: Tensor
    states: Tensor
    input_bias: Tensor | None
    state_bias: Tensor | None
    projection: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> Weights:
        """All of them, changed."""
        of_inputs, of_states = change(self.inputs), change(self.states)
        others = (None if w is None else change(w) for w in self[2:])
        return Weights(of_inputs, of_states, *others)


class Inner(NamedTuple):
    """The factors of the weights' gradients, for each row.

    Attributes:
        inputs: what `Weights.inputs` was multiplied by, [N, D].
        before: the state before the step, which `Weights.states` was multiplied by, [N, P].
        at_inputs, at_states: gradients of what these products and their biases add up to, [N, G].
        hidden: what the projection was multiplied by, [N, H], or None.
        at_outputs: gradients of what it gave, [N, P], or None.
    """

    inputs: Tensor
    before: Tensor
    at_inputs: Tensor
    at_states: Tensor
    hidden: Tensor | None
    at_outputs: Tensor | None


Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """A layer's time steps: differentiable by `backward`, which autograd is told of by the caller.

    Args:
        cell: name in `CELLS`.
        weights: detached.
        counts: rows of each step; they never grow.
        reverse: whether the last step comes first.
        dtype: what is computed in. At least float32: sums of many steps lose too much in less.
    """

    cell: str
    weights: Weights
    counts: tuple[int, ...]
    reverse: bool
    dtype: torch.dtype

    @property
    def tensors(self) -> Tensors:
        """What must not be written to before the backward."""
        return tuple(w for w in self.weights if w is not None)

    def forward(self, *inputs: Tensor) -> tuple[Tensors, Tensors]:
        """Run all steps.

        Args:
            inputs: x, rows [N, D]; the states before the first step, [S, P] and of an LSTM [S, H] too.

        Returns:
            ((outputs [N, P], the states after the last step), what `backward` is to be given).
        """
        x, *first = (t.to(self.dtype) for t in inputs)
        w = self.weights.each(lambda t: t.to(self.dtype))
        outputs, last, kept = CELLS[self.cell].forward(self, w, x, tuple(first))
        # Copies, because what is kept may not be changed, and what is handed out may.
        return (outputs.clone(), *last), (x, *first, outputs, *kept)

    def backward(
        self, grads: Sequence[Tensor | None], saved: Tensors, *, wants_inputs: bool
    ) -> tuple[tuple[Tensor | None, ...], Inner]:
        """The gradients of x and of the states before the first step, and what is inside.

        Args:
            grads: of what `forward` returns; None for what nothing used.
            saved: what it kept.
            wants_inputs: whether the gradient of x is wanted.
        """
        w = self.weights.each(lambda t: t.to(self.dtype))
        cell = CELLS[self.cell]
        count = cell.states
        x, *first, outputs = saved[: 2 + count]
        kept = saved[2 + count :]
        at_outputs, *at_last = (None if g is None else g.to(self.dtype) for g in grads)
        carried = [
            torch.zeros_like(s) if g is None else g for g, s in zip(at_last, first, strict=True)
        ]
        at_outputs = torch.zeros_like(outputs) if at_outputs is None else at_outputs
        inner, at_first = cell.backward(
            self, w, x, tuple(first), outputs, kept, at_outputs, carried
        )
        at_x = inner.at_inputs @ w.inputs if wants_inputs else None
        return (at_x, *at_first), inner

    # -- rows of steps ---------------------------------------------------------------------------

    def steps(self, t: Tensor) -> list[Tensor]:
        """The rows of each step, in the order in which they are taken: views of [N, ...]."""
        found = list(t.split_with_sizes(self.counts))
        return found[::-1] if self.reverse else found

    def before(self, first: Tensor, after: Tensor) -> Tensor:
        """The state before each step, of the states after them [N, ...] and before the first one."""
        found, state = [], first[: self._count(0)]
        for rows in self.steps(after):
            state = resized(state, rows.shape[0], first, [])
            found.append(state)
            state = rows
        return torch.cat(found[::-1] if self.reverse else found)

    def last(self, first: Tensor, after: Tensor) -> Tensor:
        """The state of each sequence after its last step, [S, ...]."""
        ended: list[Tensor] = []
        state = first[: self._count(0)]
        for rows in self.steps(after):
            resized(state, rows.shape[0], first, ended)
            state = rows
        return torch.cat([state, *ended[::-1]])

    def _count(self, step: int) -> int:
        return self.counts[-1 - step if self.reverse else step]


def resized(state: Tensor, count: int, joining: Tensor, leaving: list[Tensor]) -> Tensor:
    """The first `count` sequences of a state: the others leave, or more of `joining` come in."""
    if state.shape[0] > count:
        leaving.append(state[count:])
        return state[:count]
    return state if state.shape[0] == count else torch.cat([state, joining[state.shape[0] : count]])


Taken = tuple[Tensor, Tensors, Tensors]
Found = tuple[Inner, Tensors]


class Cell(NamedTuple):
    """The formulas of one kind of cell.

    Attributes:
        states: how many it has.
        forward: (layer, weights, x, first) -> (outputs, last states, kept).
        backward: (layer, weights, x, first, outputs, kept, gradient of outputs, gradients of the last
            states) -> (inner, gradients of the first states).
    """

    states: int
    forward: Callable[[Layer, Weights, Tensor, Tensors], Taken]
    backward: Callable[
        [Layer, Weights, Tensor, Tensors, Tensor, Tensors, Tensor, list[Tensor]], Found
    ]


def _joint_bias(w: Weights) -> Tensor | None:
    # Where a state's product is only ever added, one addition for all steps is enough.
    if w.input_bias is None or w.state_bias is None:
        return w.input_bias if w.state_bias is None else w.state_bias
    return w.input_bias + w.state_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


# -- LSTM: i, f, g, o; c' = f c + i g; h' = o tanh(c') ---------------------------------------------


def _lstm(layer: Layer, w: Weights, x: Tensor, first: Tensors) -> Taken:
    gates = _product(x, w.inputs, _joint_bias(w))
    width = gates.shape[1] // 4
    cells = x.new_empty(x.shape[0], width)
    squashed, hidden = torch.empty_like(cells), torch.empty_like(cells)
    outputs = hidden if w.projection is None else x.new_empty(x.shape[0], w.projection.shape[0])
    h, c = (s[: layer._count(0)] for s in first)
    states = w.states.t()
    parts = [gates, gates[:, : 2 * width], *gates.split(width, 1)]
    views = (layer.steps(t) for t in (*parts, cells, squashed, hidden, outputs))
    for all_, both, i, f, g, o, cell, squash, hid, out in zip(*views, strict=True):
        h = resized(h, out.shape[0], first[0], [])
        c = resized(c, out.shape[0], first[1], [])
        # In place: slopes are functions of the squashed gates, so what was squashed is not needed.
        all_.addmm_(h, states)
        both.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        c = torch.mul(f, c, out=cell).addcmul_(i, g)
        torch.tanh(c, out=squash)
        torch.mul(o, squash, out=hid)
        h = hid if w.projection is None else torch.mm(hid, w.projection.t(), out=out)
    last = layer.last(first[0], outputs), layer.last(first[1], cells)
    return outputs, last, (gates, cells, squashed)


def _lstm_gradient(
    layer: Layer, w: Weights, x: Tensor, first: Tensors, outputs: Tensor, kept: Tensors,
    at_outputs: Tensor, carried: list[Tensor],
) -> Found:  # fmt: skip
    gates, cells, squashed = kept
    width = cells.shape[1]
    i, f, g, o = gates.split(width, 1)
    # All that does not depend on the gradient first, for all steps at once.
    at_gates = torch.empty_like(gates)
    to_i, to_f, to_g, to_o = at_gates.split(width, 1)
    _sigmoid_gradient(g, i, grad_input=to_i)
    _sigmoid_gradient(layer.before(first[1], cells), f, grad_input=to_f)
    _tanh_gradient(i, g, grad_input=to_g)
    _sigmoid_gradient(squashed, o, grad_input=to_o)
    through = _tanh_gradient(o, squashed)
    projected = None if w.projection is None else torch.empty_like(outputs)
    views = [at_gates, at_gates[:, : 3 * width].unflatten(1, (3, width)), to_o, f, through]
    views += [at_outputs] if projected is None else [at_outputs, projected]
    dh, dc = carried
    left: tuple[list[Tensor], list[Tensor]] = [], []
    dh_all, dc_all = carried
    for all_, three, last_gate, forget, factor, given, *into in reversed(
        list(zip(*map(layer.steps, views), strict=True))
    ):
        dh = resized(dh, given.shape[0], dh_all, left[0])
        dc = resized(dc, given.shape[0], dc_all, left[1])
        dh = dh + given
        if w.projection is not None:
            into[0].copy_(dh)
            dh = dh @ w.projection
        dc = torch.addcmul(dc, dh, factor)
        three.mul_(dc[:, None])
        last_gate.mul_(dh)
        dc = dc.mul_(forget)
        dh = all_ @ w.states
    at_first = torch.cat([dh, *left[0][::-1]]), torch.cat([dc, *left[1][::-1]])
    before = layer.before(first[0], outputs)
    hidden = None if projected is None else o * squashed
    # Input and state enter a gate by one sum: its gradient is that of both.
    return Inner(x, before, at_gates, at_gates, hidden, projected), at_first


# -- GRU: r, z, n = tanh(in + r hn); h' = n + z (h - n) ----------------------------------------------


def _gru(layer: Layer, w: Weights, x: Tensor, first: Tensors) -> Taken:
    # The state's bias stays apart: in the new state, r multiplies it.
    gates = _product(x, w.inputs, w.input_bias)
    width = gates.shape[1] // 3
    new_state, difference = x.new_empty(x.shape[0], width), x.new_empty(x.shape[0], width)
    outputs = torch.empty_like(difference)
    h = first[0][: layer._count(0)]
    parts = gates[:, : 2 * width], *gates.split(width, 1)
    views = (layer.steps(t) for t in (*parts, new_state, difference, outputs))
    for both, r, z, n, state, apart, out in zip(*views, strict=True):
        h = resized(h, out.shape[0], first[0], [])
        from_state = _product(h, w.states, w.state_bias)
        both.add_(from_state[:, : 2 * width]).sigmoid_()
        n.addcmul_(r, state.copy_(from_state[:, 2 * width :])).tanh_()
        # h - n is kept for z's gradient: to recover it from the result would divide by z.
        h = torch.addcmul(n, z, torch.sub(h, n, out=apart), out=out)
    return outputs, (layer.last(first[0], outputs),), (gates, new_state, difference)


def _gru_gradient(
    layer: Layer, w: Weights, x: Tensor, first: Tensors, outputs: Tensor, kept: Tensors,
    at_outputs: Tensor, carried: list[Tensor],
) -> Found:  # fmt: skip
    gates, new_state, difference = kept
    width = outputs.shape[1]
    r, z, n = gates.split(width, 1)
    to_new = _tanh_gradient(1 - z, n)
    at_states, dh_of_steps = torch.empty_like(gates), torch.empty_like(outputs)
    to_r, to_z, to_n = at_states.split(width, 1)
    _sigmoid_gradient(to_new * new_state, r, grad_input=to_r)
    _sigmoid_gradient(difference, z, grad_input=to_z)
    torch.mul(to_new, r, out=to_n)
    views = at_states, at_states.unflatten(1, (3, width)), z, at_outputs, dh_of_steps
    dh, left = carried[0], list[Tensor]()
    for all_, three, keep, given, into in reversed(
        list(zip(*map(layer.steps, views), strict=True))
    ):
        dh = torch.add(resized(dh, given.shape[0], carried[0], left), given, out=into)
        three.mul_(dh[:, None])
        dh = torch.mul(dh, keep).addmm_(all_, w.states)
    at_inputs = at_states.clone()  # the same but for n, where r multiplies what the state gives
    torch.mul(to_new, dh_of_steps, out=at_inputs[:, 2 * width :])
    before = layer.before(first[0], outputs)
    return Inner(x, before, at_inputs, at_states, None, None), (torch.cat([dh, *left[::-1]]),)


# -- RNN: h' = tanh(...) or relu(...) ----------------------------------------------------------------


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable[..., Taken]:
    def forward(layer: Layer, w: Weights, x: Tensor, first: Tensors) -> Taken:
        outputs = _product(x, w.inputs, _joint_bias(w))
        h, states = first[0][: layer._count(0)], w.states.t()
        for out in layer.steps(outputs):
            h = activation(out.addmm_(resized(h, out.shape[0], first[0], []), states))
        return outputs, (layer.last(first[0], outputs),), ()

    return forward


def _rnn_gradient(slope: Callable[[Tensor], Tensor]) -> Callable[..., Found]:
    def backward(
        layer: Layer, w: Weights, x: Tensor, first: Tensors, outputs: Tensor, kept: Tensors,
        at_outputs: Tensor, carried: list[Tensor],
    ) -> Found:  # fmt: skip
        # The slope as a function of the output: nothing else is kept.
        at_gates = slope(outputs)
        dh, left = carried[0], list[Tensor]()
        views = at_gates, at_outputs
        for all_, given in reversed(list(zip(*map(layer.steps, views), strict=True))):
            all_.mul_(resized(dh, given.shape[0], carried[0], left) + given)
            dh = all_ @ w.states
        before = layer.before(first[0], outputs)
        inner = Inner(x, before, at_gates, at_gates, None, None)
        return inner, (torch.cat([dh, *left[::-1]]),)

    return backward


CELLS = {
    "lstm": Cell(2, _lstm, _lstm_gradient),
    "gru": Cell(1, _gru, _gru_gradient),
    "rnn_tanh": Cell(1, _rnn(torch.tanh_), _rnn_gradient(lambda h: 1 - h.square())),
    "rnn_relu": Cell(1, _rnn(torch.relu_), _rnn_gradient(lambda h: (h > 0).to(h.dtype))),
}
