"""What a torch function mode does not see by itself: custom autograd Functions and checkpointing.

Both are patched while a recording is active, and only then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as checkpoint
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

from dptorch.errors import NotCoveredError
from dptorch.tape.calls import Call, each_tensor
from dptorch.tape.provenance import ParamOnly, Tag
from dptorch.tape.recording import Recording, active_modes
from dptorch.tape.rules import generic
from dptorch.tape.taps import TAPS

__all__ = ["visible"]

_depth = 0
_plain_apply: Any = Function.__dict__["apply"]
_plain_generator: Any = checkpoint._checkpoint_without_reentrant_generator  # type: ignore[attr-defined]


def _innermost() -> Recording | None:
    for mode in reversed(active_modes()):
        if isinstance(mode, Recording):
            return mode
    return None


@contextmanager
def visible() -> Iterator[None]:
    """Patch on the first entry, restore on the last exit."""
    global _depth
    if _depth == 0:
        Function.apply = classmethod(_apply)  # type: ignore[method-assign,assignment]
        checkpoint._checkpoint_without_reentrant_generator = _generator  # type: ignore[attr-defined]
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            Function.apply = _plain_apply  # type: ignore[method-assign]
            checkpoint._checkpoint_without_reentrant_generator = _plain_generator  # type: ignore[attr-defined]


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    original = _plain_apply.__get__(None, cls)
    recording = None if cls in TAPS else _innermost()
    if recording is None:
        return original(*args, **kwargs)
    if cls is checkpoint.CheckpointFunction:
        return original(_recorded(args[0], args[2:], recording, reentrant=True), *args[1:])
    tensors = list(each_tensor(args, kwargs))
    states = [(t, recording.state(t)) for t in tensors]
    tagged = [(t, s) for t, s in states if isinstance(s, Tag)]
    parameters = [
        t
        for t, s in states
        if t.requires_grad and (isinstance(s, ParamOnly) or id(t) in recording.tape.names)
    ]
    if not parameters or not tagged or not torch.is_grad_enabled():
        return original(*args, **kwargs)

    def run(*a: Any, **k: Any) -> Any:
        with recording:  # the ops inside tell where the examples go
            return original(*a, **k)

    distinct = list({id(p): p for p in parameters}.values())
    for p in distinct:
        recording.count_use(p)
    name = f"{cls.__name__}.apply"
    with torch._C.DisableTorchFunction():
        return generic(
            Call(run, name, args, kwargs, tagged, distinct, recording.batch_size), recording
        )


def _generator(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    recording = _innermost()
    if recording is not None:
        inputs = args[4:]  # preserve_rng_state, context_fn, determinism_check, debug, (early_stop)
        fn = _recorded(fn, (inputs, kwargs), recording, reentrant=False)
    return _plain_generator(fn, *args, **kwargs)


def _recorded(
    fn: Callable[..., Any], inputs: Any, recording: Recording, *, reentrant: bool
) -> Callable[..., Any]:
    """`fn`, recorded again when the backward recomputes it, outside the recording."""
    states = [
        recording.state(t) if isinstance(t, Tensor) else None for t in tree_leaves(inputs)
    ]

    def run(*args: Any, **kwargs: Any) -> Any:
        if any(mode is recording for mode in active_modes()):
            return fn(*args, **kwargs)
        leaves = [t for t in tree_leaves((args, kwargs))]
        for t, state in zip(leaves, states[-len(leaves) :] if leaves else [], strict=False):
            if not isinstance(t, Tensor) or state is None or recording.state(t) is not None:
                continue
            if reentrant and isinstance(state, ParamOnly):
                raise NotCoveredError(
                    "a tensor computed from parameters alone is passed into a reentrant "
                    "checkpoint. Use use_reentrant=False."
                )
            recording.mark(t, state)
        with recording:
            return fn(*args, **kwargs)

    return run
