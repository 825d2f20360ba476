"""The rule for every other op: differentiate the op as it was recorded, one example at a time.

The op runs on fresh leaf copies of its parameters. In the backward the output's gradient is
separated into B copies, each zero but for one example, and one batched ``autograd.grad`` takes all
of them through the op. Exact for anything PyTorch can differentiate, dropout masks included, at B
times the cost of that op's backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from dptorch.errors import NotCoveredError
from dptorch.tape.gradients import Dense, PerExampleGradient
from dptorch.tape.gradients.vjp import batched_vjp
from dptorch.tape.propagation import infer
from dptorch.tape.provenance.calls import Call, replace_tensors
from dptorch.tape.provenance.tags import Lost, Tag, separate
from dptorch.tape.rules.recorder import Recorder

__all__ = ["generic"]


def generic(call: Call, recording: Recorder) -> Any:
    """Record an op that has no rule of its own.

    Raises:
        NotCoveredError: if it is not known where the op leaves the examples.
    """
    copies = {id(p): p.detach().requires_grad_() for p in call.parameters}
    target = call.args[0] if call.in_place else None
    if target is None:
        result = call.run(copies)
    else:  # on a copy, so that the tensor written to ends up behind the tap
        table = {**copies, id(target): copies.get(id(target), target).clone()}
        result = call.run(table)
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    try:
        tags = _tags(call, recording, outputs)
    except Lost as lost:
        names = ", ".join(recording.describe(p) for p in call.parameters)
        raise NotCoveredError(
            f"{recording.module_path()}: {names} used in '{call.name}', where {lost}. "
            "If the op treats the rows of dimension 0 independently, say so with "
            f"dptorch.tape.rowwise({call.name!r}); otherwise freeze the parameter "
            "(requires_grad_(False)) or write it with other ops."
        ) from None
    pairs = [
        (o, t)
        for o, t in zip(outputs, tags, strict=True)
        if isinstance(o, Tensor) and o.requires_grad
    ]
    bad = [t for _, t in pairs if not isinstance(t, Tag)]
    if bad:
        names = ", ".join(recording.describe(p) for p in call.parameters)
        raise NotCoveredError(
            f"{recording.module_path()}: {names} used in '{call.name}', which reduces over the "
            "examples. Keep one value for each example until the loss."
        )
    raw = [o for o, _ in pairs]
    raw_tags = [t for _, t in pairs if isinstance(t, Tag)]
    leaves = [copies[id(p)] for p in call.parameters]
    n, parameters = call.batch_size, call.parameters  # not the call, which holds its arguments

    def gradients(
        grads: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        used = [(o, g, t) for o, g, t in zip(raw, grads, raw_tags, strict=True) if g is not None]

        def separated(start: int, stop: int) -> list[Tensor]:
            return [separate(g, t, n, start, stop) for _, g, t in used]

        size = sum(g.numel() for _, g, _ in used)
        found = batched_vjp([o for o, _, _ in used], leaves, separated, n, size)
        for p, grad in zip(parameters, found, strict=True):
            if grad is not None:
                yield p, Dense(grad)

    recording.note_generic(call)
    tapped = recording.tap_many(raw, raw_tags, (), gradients)
    if target is not None:
        before = recording.state(target)
        target.copy_(tapped[0])
        if before != raw_tags[0]:
            recording.mark_written(target, before, raw_tags[0])
        return target
    return replace_tensors(result, {id(o): t for o, t in zip(raw, tapped, strict=True)})


def _tags(call: Call, recording: Recorder, outputs: Sequence[Any]) -> list[Any]:
    known = [recording.state(o) if isinstance(o, Tensor) else None for o in outputs]
    if any(isinstance(state, Tag) for state in known):
        return known  # a custom autograd.Function, whose inner ops were followed
    return list(infer(call, outputs))
