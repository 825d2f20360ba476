"""Index assignment, ``x[index] = value``, where any of the three may carry examples; and filling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dptorch.errors import NotCoveredError
from dptorch.tape.propagation.movement import region
from dptorch.tape.propagation.writing import owners_after
from dptorch.tape.provenance.calls import Call, each_tensor
from dptorch.tape.provenance.tags import Lost, Mixed, State, Tag, read_shadow, shadow
from dptorch.tape.rules.recorder import Recorder

__all__ = ["assign", "assign_parameter", "fill"]


def assign(call: Call, recording: Recorder) -> None:
    """Run the assignment and mark what it wrote to."""
    x, index, value = call.args
    before = call.tag_of(x)
    after: State | None
    try:
        after = owners_after(call, x, index, value)
    except Lost as lost:
        after = Mixed(f"{recording.module_path()}: index assignment: {lost}.")
    call.func(x, index, value)
    if after != before:
        recording.mark_written(x, before, after)


def assign_parameter(call: Call, recording: Recorder) -> None:
    """``x[index] = parameter``: the parameter is lifted along the examples.

    Raises:
        NotCoveredError: where the value is not the parameter, or goes to some examples only.
    """
    x, index, value = call.args
    tag = call.tag_of(x)
    if tag is None or not call.is_parameter(value):
        raise NotCoveredError(
            f"{recording.module_path()}: examples are written into {recording.describe(x)} by index "
            "assignment. Build the result with torch.cat or torch.where instead."
        )
    if tag.dim is None:
        target, part = x[index].shape, tag
    else:
        if any(
            call.tag_of(p) is not None for p in (index if isinstance(index, tuple) else (index,))
        ):
            region(call, x, tag, index)
        moved = shadow(x.shape, tag.dim, x.device)[index]
        target, part = moved.shape, read_shadow(moved, tag, x.shape[tag.dim], recording.batch_size)
    call.func(x, index, recording.lift(value, target, part))


def fill(
    recording: Recorder, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """``x.zero_()``, ``x.fill_(number)`` outside the model, of a buffer that is used again: it holds no
    examples any longer. NotImplemented for tensors with a gradient and values given by tensors."""
    x = args[0]
    before = recording.state(x)
    if not isinstance(before, (Tag, Mixed)) or x.requires_grad or each_tensor(args[1:], kwargs):
        return NotImplemented
    out = func(*args, **kwargs)
    recording.mark_written(x, before, None)
    return out
