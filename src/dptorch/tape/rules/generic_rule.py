"""The rule for every other op: differentiate the op as it was recorded, one example at a time.

The op runs on fresh leaf copies of its parameters. In the backward the output's gradient is
separated into B copies, each zero but for one example, and one batched ``autograd.grad`` takes all
of them through the op. Exact for anything PyTorch can differentiate, dropout masks included, at B
times the cost of that op's backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dptorch.errors import NotCoveredError
from dptorch.tape.gradients import Dense, PerExampleGradient
from dptorch.tape.gradients.vjp import batched_vjp
from dptorch.tape.propagation import infer
from dptorch.tape.provenance.calls import Call, replace_tensors
from dptorch.tape.provenance.tags import Lost, Tag, owners, separate
from dptorch.tape.rules.recorder import Recorder

__all__ = ["generic"]


def generic(call: Call, recording: Recorder) -> Any:
    """Record an op that has no rule of its own.

    Raises:
        NotCoveredError: if it is not known where the op leaves the examples.
    """
    copies = {id(p): p.detach().requires_grad_() for p in call.parameters}
    target = call.args[0] if call.in_place else None
    random_state = torch.get_rng_state()
    result = _run(call, copies, target)
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
    broken = _not_finite(call.tagged + list(zip(raw, raw_tags, strict=True)), n)
    spare = (
        None if broken is None else _spare(call, copies, target, outputs, raw, broken, random_state)
    )

    def gradients(
        grads: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, PerExampleGradient]]:
        used = [(o, g, t) for o, g, t in zip(raw, grads, raw_tags, strict=True) if g is not None]

        def separated(start: int, stop: int) -> list[Tensor]:
            return [separate(g, t, n, start, stop) for _, g, t in used]

        size = sum(g.numel() for _, g, _ in used)
        found = batched_vjp([o for o, _, _ in used], leaves, separated, n, size)
        if broken is not None and spare is not None and _reached_others(found, broken):
            others = [s for s, g in zip(spare, grads, strict=True) if g is not None]
            found = batched_vjp(others, leaves, separated, n, size)
            for grad in found:
                if grad is not None:
                    # The spare run put zeros for them: a finite gradient would hide what they are.
                    grad[broken] = math.nan
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


def _run(call: Call, replaced: dict[int, Tensor], target: Tensor | None) -> Any:
    """Run the op with some operands replaced; one that writes to its target, on a copy of that."""
    if target is None:
        return call.run(replaced)
    return call.run({**replaced, id(target): replaced.get(id(target), target).clone()})


def _not_finite(values: Sequence[tuple[Tensor, Tag]], n: int) -> Tensor | None:
    """The examples of which some value is not finite, [B]; None where there is none, or no other."""
    bad = torch.zeros(n, dtype=torch.bool)
    for t, tag in values:
        if not t.is_floating_point() or t.isfinite().all():
            continue
        if tag.dim is None:
            bad[tag.step] = True
            continue
        rows = ~t.detach().isfinite().movedim(tag.dim, 0).flatten(1).all(1)
        owner = owners(tag, t.shape[tag.dim], n, t.device)[rows]
        bad[owner[owner >= 0].cpu()] = True
    return bad if bad.any() and not bad.all() else None


def _spare(
    call: Call,
    copies: dict[int, Tensor],
    target: Tensor | None,
    outputs: Sequence[Any],
    raw: Sequence[Tensor],
    bad: Tensor,
    random_state: Tensor,
) -> list[Tensor]:
    """The outputs `raw` of the op without the values of examples that are not finite.

    One example's share of a gradient is taken with cotangents of zero for all others. Zero times the
    NaN of another is NaN, so that one such example would take all others with it.
    """
    clean = {}
    for t, tag in call.tagged:
        if t.is_floating_point() and tag.dim is not None:
            owner = owners(tag, t.shape[tag.dim], call.batch_size, t.device)
            shape = [-1 if i == tag.dim else 1 for i in range(t.dim())]
            taken = (bad.to(t.device)[owner.clamp(min=0)] & (owner >= 0)).view(shape)
            clean[id(t)] = t.detach().masked_fill(taken, 0)
        elif t.is_floating_point() and bad[tag.step]:
            clean[id(t)] = torch.zeros_like(t)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(random_state)
        again = _run(call, {**clean, **copies}, target)
    again = again if isinstance(again, (tuple, list)) else (again,)
    return [s for o, s in zip(outputs, again, strict=True) if any(o is r for r in raw)]


def _reached_others(found: Sequence[Tensor | None], bad: Tensor) -> bool:
    """Whether gradients of examples whose values are finite are not."""
    good = (~bad).nonzero().flatten()
    return any(g is not None and not g[good.to(g.device)].isfinite().all() for g in found)


def _tags(call: Call, recording: Recorder, outputs: Sequence[Any]) -> list[Any]:
    known = [recording.state(o) if isinstance(o, Tensor) else None for o in outputs]
    if any(isinstance(state, Tag) for state in known):
        return known  # a custom autograd.Function, whose inner ops were followed
    return list(infer(call, outputs))
