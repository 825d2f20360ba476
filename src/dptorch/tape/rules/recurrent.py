"""Recurrent networks: nn.LSTM, nn.GRU and nn.RNN in all their options, and their cells.

Each layer runs by itself (`recurrence`), one direction after the other, so that the gradients at its
gates are seen. A weight's gradient is then that of a linear layer whose positions are the time steps.

Shape legend: B examples, S sequences, T steps, N rows of all steps, m positions folded into the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.tape.gradients import Dense, Outer, PerExampleGradient
from dptorch.tape.propagation.layers import recurrent as tags_of
from dptorch.tape.provenance.calls import Call
from dptorch.tape.provenance.tags import Tag, rows
from dptorch.tape.rules.recorder import Recorder
from dptorch.tape.rules.recurrence import Inner, Layer, Weights
from dptorch.tape.rules.registry import rule

__all__ = ["cell", "recurrent"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Rows(NamedTuple):
    """Where a layer's rows [N, ...] are.

    Attributes:
        counts: of each step.
        tag: of the rows; or of [T, S, ...], if all steps have the same number.
        flat: whether it is of the rows.
    """

    counts: tuple[int, ...]
    tag: Tag
    flat: bool

    def unfolded(self, t: Tensor) -> Tensor:
        """What the tag is of."""
        return t if self.flat else t.unflatten(0, (len(self.counts), self.counts[0]))

    def by_example(self, t: Tensor, batch_size: int) -> Tensor:
        """[B, m * T, ...]."""
        return rows(self.unfolded(t), self.tag, batch_size).flatten(1, -2)


@rule("lstm gru rnn_tanh rnn_relu")
def recurrent(call: Call, recording: Recorder) -> Any:
    """All layers in all directions, with torch's own dropout between layers.

    In half precision and under autocast, layers compute in float32 and give what torch's type is.
    """
    x, counts = call.first, call.arg("batch_sizes")
    states, weights = _listed(call.arg("hx")), list(call.arg("params"))
    known = call.tag_of(x)
    if known is None or known.dim is None:  # one example's
        return NotImplemented
    tag, *of_states = tags_of(call, (None,) * (1 + len(states)))
    layers, directions = call.arg("num_layers"), 1 + call.arg("bidirectional")
    sequences = x.shape[1 - call.arg("batch_first")] if counts is None else int(counts[0])
    fits = all(s.shape[:2] == (layers * directions, sequences) for s in states)
    if not fits or not isinstance(tag, Tag) or not _is_plain(call, x, states, weights, recording):
        return NotImplemented
    dtypes = _dtypes(call, x, counts, states)
    states = _lifted(call, states, of_states[0], recording)
    if counts is None:
        first = x.transpose(0, 1) if call.arg("batch_first") else x
        where = _Rows((sequences,) * len(first), tag.at(1), False)
        x = first.flatten(0, 1)
    else:
        where = _Rows(tuple(counts.tolist()), tag, True)
    each = len(weights) // (layers * directions)
    last: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        if layer:
            dropped = F.dropout(where.unfolded(x), call.arg("dropout"), call.arg("train"))
            x = dropped if where.flat else dropped.flatten(0, 1)
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            own = _weights(weights[i * each : (i + 1) * each], call.arg("has_biases"))
            out, *ends = _layer(
                call, recording, where, x, own, [s[i] for s in states], reverse=direction == 1
            )
            outputs.append(out)
            last.append(tuple(ends))
        x = outputs[0] if directions == 1 else torch.cat(outputs, 1)
    x = where.unfolded(x)
    x = x.transpose(0, 1) if counts is None and call.arg("batch_first") else x
    results = x, *map(torch.stack, zip(*last, strict=True))
    return _marked(recording, results, [tag, *of_states], dtypes)


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(call: Call, recording: Recorder) -> Any:
    """One step of a layer."""
    x, states = call.first, _listed(call.arg("hx"))
    weights = [call.arg(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    given = [w for w in weights if w is not None]
    tag = call.tag_of(x)
    if x.dim() != 2 or len(given) % 2 or not _is_plain(call, x, states, given, recording):
        return NotImplemented
    if tag is None or tag.dim != 0 or any(s.dim() != 2 or len(s) != len(x) for s in states):
        return NotImplemented
    if any(other != tag for _, other in call.tagged):
        return NotImplemented
    dtypes = _dtypes(call, x, None, states)
    name = call.name.removesuffix("_cell")
    where = _Rows((len(x),), tag, True)
    own = _weights(given, len(given) == 4)
    states = _lifted(call, states, tag, recording)
    _, *ends = _layer(call, recording, where, x, own, states, reverse=False, name=name)
    results = _marked(recording, ends, [tag] * len(ends), dtypes)
    return results if len(results) > 1 else results[0]


def _layer(
    call: Call,
    recording: Recorder,
    where: _Rows,
    x: Tensor,
    weights: Weights,
    states: Sequence[Tensor],
    *,
    reverse: bool,
    name: str = "",
) -> tuple[Tensor, ...]:
    """One layer in one direction: its outputs [N, P] and the states after its last step."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    detached = weights.each(lambda w: w.detach())
    layer = Layer(name or call.name, detached, where.counts, reverse, dtype)
    wanted = {id(w) for w in weights if call.is_parameter(w)}
    recording.tape.note_size(x.shape[0] * weights.states.shape[0] * x.element_size())
    n = call.batch_size

    def gradients(inner: Inner) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        at_inputs = at_states = where.by_example(inner.at_inputs, n)
        # In a GRU the reset gate stands between, so that its state weights see another gradient.
        if inner.at_states is not inner.at_inputs:
            at_states = where.by_example(inner.at_states, n)
        for w, left, right in (
            (weights.inputs, at_inputs, inner.inputs),
            (weights.states, at_states, inner.before),
        ):
            if id(w) in wanted:
                yield w, Outer(left, where.by_example(right, n), w.shape)
        if inner.at_outputs is not None and id(weights.projection) in wanted:
            assert weights.projection is not None
            assert inner.hidden is not None
            left, right = (where.by_example(t, n) for t in (inner.at_outputs, inner.hidden))
            yield weights.projection, Outer(left, right, weights.projection.shape)
        for b, left in ((weights.input_bias, at_inputs), (weights.state_bias, at_states)):
            if b is not None and id(b) in wanted:
                yield b, Dense(left.sum(1))

    return recording.tap_inside(layer, [x, *states], gradients)


# -- arguments and results ---------------------------------------------------------------------------


def _listed(states: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [states] if isinstance(states, Tensor) else list(states)


def _weights(given: Sequence[Tensor], has_biases: bool) -> Weights:
    """Those of one layer in one direction, from how torch puts them in a row."""
    of_inputs, of_states, *rest = given
    input_bias, state_bias = rest[:2] if has_biases else (None, None)
    return Weights(
        of_inputs, of_states, input_bias, state_bias, rest[-1] if len(rest) % 2 else None
    )


def _is_plain(
    call: Call, x: Tensor, states: list[Tensor], weights: list[Tensor], recording: Recorder
) -> bool:
    """Whether each parameter is one weight, or states, and the examples are in the other operands."""
    if any(recording.untransposed(p)[1] for p in call.parameters):
        return False
    # A weight in two places would get two gradients here; the generic rule adds up its uses.
    if len({*map(id, weights), *map(id, states)}) < len(weights) + len({*map(id, states)}):
        return False
    if any(call.tag_of(w) is not None for w in weights):
        return False
    alike = {t.dtype for t in (x, *states)}
    return len(alike) == 1 and alike <= set(_FLOATS)


def _lifted(call: Call, states: list[Tensor], tag: Any, recording: Recorder) -> list[Tensor]:
    """States before the first step that are learned: a copy for each example."""
    return [recording.lift(s, s.shape, tag) if call.is_parameter(s) else s for s in states]


def _dtypes(
    call: Call, x: Tensor, counts: Tensor | None, states: list[Tensor]
) -> list[torch.dtype]:
    """Of the results, in torch's order. What autocast makes of them is best asked of torch."""
    if not torch.is_autocast_enabled(x.device.type):
        return [x.dtype] * (1 + len(states))
    if call.name.endswith("_cell"):
        # One row has the types of all, at the cost of one.
        table = {id(t): t.detach()[:1] for t in (x, *states)}
    else:
        table = {id(s): s.detach()[:, :1] for s in states}
        table[id(x)] = x.detach()[:1] if counts is not None else x.detach()[:1, :1]
        if counts is not None:
            table[id(counts)] = torch.ones_like(counts[:1])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = call.run(table)
    return [t.dtype for t in (found if isinstance(found, tuple) else (found,))]


def _marked(
    recording: Recorder, results: Sequence[Tensor], tags: Sequence[Any], dtypes: list[torch.dtype]
) -> tuple[Tensor, ...]:
    found = tuple(t.to(dtype) for t, dtype in zip(results, dtypes, strict=False))
    for t, tag in zip(found, tags, strict=True):
        recording.mark(t, tag)
    return found
