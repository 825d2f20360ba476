"""Follow a value that all examples have gone into: a loss, or a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from dptorch.errors import ExamplesMixError, NotCoveredError
from dptorch.tape.provenance.calls import Info, each_tensor
from dptorch.tape.provenance.loss_reduction import follow_loss, plus_constant
from dptorch.tape.provenance.tags import Mixed, Reduced, State, Tag
from dptorch.tape.recording.finite_checks import CHECKS, note_check
from dptorch.tape.recording.places import way_out_of_a_known_module
from dptorch.tape.rules.recorder import Recorder

__all__ = ["after_the_batch", "leaves"]


def after_the_batch(
    recording: Recorder,
    known: Info,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tagged: list[tuple[Tensor, Tag]],
    parameters: dict[int, Tensor],
    lost: Mixed | Reduced,
) -> Any:
    """An op on a value that all examples have gone into: a loss, or a mixture."""
    name = known.name
    if isinstance(lost, Mixed) and parameters:
        raise ExamplesMixError(
            f"{lost.reason} The result meets {recording.describe(next(iter(parameters.values())))} "
            f"in '{name}', so the gradient of one example depends on the others."
            + way_out_of_a_known_module()
        )
    if parameters:
        raise NotCoveredError(
            f"{recording.module_path()}: a term computed from "
            f"{recording.describe(next(iter(parameters.values())))} alone joins the loss in "
            f"'{name}'. It has no per-example gradient and would be clipped with the examples' "
            "or not at all. Use the optimizer's weight_decay for an L2 penalty, which costs no "
            "privacy; or add the term to each example's loss before reducing."
        )
    state: State = lost
    if isinstance(lost, Mixed) and name in ("add", "sub") and not tagged:
        lost = plus_constant([(t, recording.state(t)) for t in each_tensor(args, kwargs)], lost)
    if isinstance(lost, Reduced):
        states = map(recording.state, each_tensor(args, kwargs))
        state = follow_loss(
            name,
            args,
            kwargs,
            [s for s in states if isinstance(s, Reduced)],
            examples=tagged,
            is_loss=lambda t: isinstance(t, Tensor) and isinstance(recording.state(t), Reduced),
            where=recording.module_path,
        )
    before = [(t, recording.state(t)) for t in args[:1] if isinstance(t, Tensor)]
    out = func(*args, **kwargs)
    if name in CHECKS:
        note_check(name, args[0] if args else None, out)
    written = name == "__setitem__" or (known.in_place and not isinstance(out, Tensor))
    changed = args[:1] if name == "__setitem__" else each_tensor(args, kwargs)
    for o in changed if written else leaves(out):
        own = state
        if not isinstance(state, Mixed) and not o.requires_grad:
            own = recording.statistic(name)
        was = next((s for t, s in before if t is o), None)
        if written or known.in_place or kwargs.get("out") is not None:
            if was != own:
                recording.mark_written(o, was, own)
        else:
            recording.mark(o, own)
    return out


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, inside lists and tuples too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from leaves(v)
