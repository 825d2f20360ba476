"""What a torch function mode does not see by itself: custom autograd Functions,
checkpointing, Parameters that are made on the way, and ``Tensor.set_``.

They are patched while a recording is active or a model has an engine. What is patched asks for the
recording that is active in its thread, and without one it does what it did. (To patch and restore for
each forward pass would make Python forget, each time, where it found the attributes of ``Tensor``.)
Custom Functions, TorchScript and the backward hooks of modules stay patched from the first model that
is recorded on: a loss may apply one to followed tensors, and none of them asks those.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
import torch.utils.checkpoint as checkpoint
import torch.utils.hooks
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

from dptorch.tape.propagation import FAMILIES, infer
from dptorch.tape.provenance.calls import Call, each_tensor
from dptorch.tape.provenance.tags import PARAM_ONLY, Mixed, ParamOnly, Reduced, Tag
from dptorch.tape.recording.backward_code import (
    BackwardNote,
    FollowedBackwardHook,
    as_tuple,
    followed_function,
)
from dptorch.tape.recording.handlers import SPECIAL, Args, Kwargs, handler
from dptorch.tape.recording.recording import Recording, active_modes, innermost
from dptorch.tape.recording.taps import TAPS
from dptorch.tape.recording.tensor_states import is_followed
from dptorch.tape.recording.unseen import script, watch
from dptorch.tape.rules import generic
from dptorch.tape.rules.recorder import Recorder

__all__ = ["patch", "patched", "unpatch"]

_depth = 0
_unwatch: Callable[[], None] = lambda: None
_apply_function: Any = Function.__dict__["apply"].__func__
_plain_code: Any = _apply_function.__code__
_plain_apply: Any = types.FunctionType(
    _plain_code, _apply_function.__globals__, "apply", None, _apply_function.__closure__
)
_plain_set: Any = torch._C.TensorBase.set_
_plain_new: Any = nn.Parameter.__new__
_plain_generator: Any = checkpoint._checkpoint_without_reentrant_generator


def patch_functions() -> None:
    """Patch custom Functions, TorchScript and backward hooks for good; they look at their arguments."""
    _apply_function.__globals__["_dptorch_apply"] = _apply
    _apply_function.__code__ = _redirect.__code__
    for kind, call in _script_calls.items():
        kind.__call__ = call
    Tensor.set_ = _set  # type: ignore[assignment,method-assign]
    torch.nn.modules.module.BackwardHook = _backward_hook  # type: ignore[assignment,attr-defined]


def patch() -> None:
    """Patch, unless it is done; `unpatch` ends it."""
    global _depth, _unwatch
    if _depth == 0:
        _unwatch = watch(innermost)
        patch_functions()
        checkpoint._checkpoint_without_reentrant_generator = _generator
        nn.Parameter.__new__ = _new_parameter  # type: ignore[method-assign]
    _depth += 1


def unpatch() -> None:
    """Restore what was there before the first `patch`, when as many have ended as were begun."""
    global _depth
    _depth -= 1
    if _depth == 0:
        _unwatch()
        nn.Parameter.__new__ = _plain_new  # type: ignore[method-assign]
        checkpoint._checkpoint_without_reentrant_generator = _plain_generator


class _Patched:
    def __enter__(self) -> None:
        patch()

    def __exit__(self, *_: object) -> None:
        unpatch()


_PATCHED = _Patched()


def patched() -> AbstractContextManager[None]:
    """`patch` inside a with statement."""
    return _PATCHED


@wraps(_plain_set)
def _set(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``Tensor.set_``, which no function mode sees."""
    recording = innermost()
    if recording is None:
        kind = _followed_type((self, *args), kwargs)
        if kind is None:
            return _plain_set(self, *args, **kwargs)
        return kind.__torch_function__(_plain_set, (), (self, *args), kwargs)
    return SPECIAL["set"](recording, _plain_set, "set", (self, *args), kwargs)


def _make_redirect() -> Any:
    """Code for ``Function.apply`` that calls what is patched in, also where a program bound
    ``MyFunction.apply`` to a name before. It must close over what the original closes over."""
    __class__ = Function

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        __class__  # noqa: B018
        return _dptorch_apply(cls, *args, **kwargs)  # type: ignore[name-defined]  # noqa: F821

    return apply


_redirect = _make_redirect()


def _backward_hook(module: nn.Module, hooks: Any, pre_hooks: Any) -> Any:
    """A module's full backward hooks, which get the gradients of all examples."""
    return FollowedBackwardHook(innermost(), module, hooks, pre_hooks)


def _new_parameter(cls: Any, data: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """A Parameter made in a recorded forward pass holds the examples of what it is made from.

    One of constants (PEFT transposes a frozen weight so) is gone after it, and nothing trains it.
    """
    made = _plain_new(cls, data, *args, **kwargs)
    recording = innermost()
    if recording is not None and data is not None:
        state = recording.state(data)
        if isinstance(state, Reduced):
            state = recording.statistic("Parameter")
        if isinstance(state, (Tag, Mixed)):
            recording.mark(made, state)
        elif state is None and not data.requires_grad:
            recording.note_own_leaf(made)
    return made


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    original = types.MethodType(_plain_apply, cls)
    recording = None if cls in TAPS else innermost()
    if recording is None:
        kind = None if cls in TAPS else _followed_type(args, kwargs)
        if kind is None:
            return original(*args, **kwargs)
        return kind.__torch_function__(_apply_function_to, (), (cls, *args), kwargs)
    if cls is checkpoint.CheckpointFunction:
        function, preserve, *inputs = args
        if not any(t.requires_grad for t in each_tensor(args, kwargs)):
            return original(*args)  # whatever is trained inside gets no gradient, as without us
        # Without reentry values of the outside stay in autograd's graph when it is recomputed.
        return checkpoint.checkpoint(
            function,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=preserve,
            determinism_check="none",
        )
    tensors = list(each_tensor(args, kwargs))
    states = [(t, recording.state(t)) for t in tensors]
    known = {id(t): s for t, s in states}
    tagged = [(t, s) for t, s in states if isinstance(s, Tag)]
    parameters = [
        t
        for t, s in states
        if t.requires_grad and (isinstance(s, ParamOnly) or id(t) in recording.tape.names)
    ]
    lost = next((s for _, s in states if isinstance(s, (Mixed, Reduced))), None)
    if lost is not None:
        return _after_the_batch(original(*args, **kwargs), cls, lost, recording)
    if not tagged:
        out = original(*args, **kwargs)
        if parameters and torch.is_grad_enabled():
            _from_parameters(out, parameters, recording)
        return out
    if not parameters or not torch.is_grad_enabled():
        if not torch.is_grad_enabled() or cls.__module__.partition(".")[0] == "torch":
            return _passed_on(original(*args, **kwargs), cls, tagged, recording)
        note = BackwardNote(recording, cls, [known.get(id(t)) for t in args])
        out = _passed_on(
            followed_function(cls, _plain_apply)(note, *args, **kwargs), cls, tagged, recording
        )
        note.outputs = [
            recording.state(o) if isinstance(o, Tensor) else None for o in as_tuple(out)
        ]
        return out

    def run(*a: Any, **k: Any) -> Any:
        # The ops inside tell where the examples go.
        with torch._C._EnableTorchFunction():
            if recording in active_modes():
                return original(*a, **k)
            with recording:
                return original(*a, **k)

    distinct = list({id(p): p for p in parameters}.values())
    for p in distinct:
        recording.tape.note_use(p)
    name = f"{cls.__name__}.apply"
    with torch._C.DisableTorchFunction():
        return generic(
            Call(run, name, args, kwargs, tagged, distinct, recording.batch_size), recording
        )


def _followed_type(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The class of the followed tensors among the arguments, outside of any recording."""
    for t in each_tensor(args, kwargs):
        if is_followed(t):
            return type(t)
    return None


def _apply_function_to(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return types.MethodType(_plain_apply, cls)(*args, **kwargs)


@handler(f"{__name__}._apply_function_to")
def apply_outside(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """A custom Function that the loop applies to followed tensors: as inside a model."""
    with recording:
        return _apply(*args, **kwargs)


def _script_call(plain: Any) -> Any:
    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        """TorchScript, which asks neither a function mode nor its arguments."""
        recording = innermost()
        if recording is not None:
            return script(recording, plain, (function, *args), kwargs)
        kind = _followed_type(args, kwargs)
        if kind is None:
            return plain(function, *args, **kwargs)
        return kind.__torch_function__(_run_script, (), (plain, function, *args), kwargs)

    return call


_script_calls: dict[Any, Any] = {
    kind: _script_call(kind.__call__) for kind in (torch._C.ScriptFunction, torch._C.ScriptMethod)
}


def _run_script(plain: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    return plain(function, *args, **kwargs)


@handler(f"{__name__}._run_script")
def script_outside(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """A function of TorchScript that the loop calls with followed tensors."""
    return script(recording, func, args, kwargs, inside=False)


def _from_parameters(out: Any, parameters: list[Tensor], recording: Recording) -> None:
    """Mark what a custom Function made of parameters alone (a weight in two signs, a product of
    factors): autograd goes on through the Function's own backward."""
    followed = {id(p) for p in parameters} & recording.tape.names.keys()
    recording.tape.note_derived(followed)
    for o in tree_leaves(out):
        # What the ops inside made of examples, which the Function closes over, stays theirs.
        if isinstance(o, Tensor) and o.requires_grad and recording.state(o) is None:
            recording.mark(o, PARAM_ONLY)


def _after_the_batch(out: Any, cls: Any, lost: Mixed | Reduced, recording: Recording) -> Any:
    """Mark what a custom Function made of a value that all examples have gone into."""
    state = recording.statistic(f"{cls.__name__}.apply") if isinstance(lost, Reduced) else lost
    for o in tree_leaves(out):
        if isinstance(o, Tensor):
            recording.mark(o, state)
    return out


def _passed_on(out: Any, cls: Any, tagged: list[tuple[Tensor, Tag]], recording: Recording) -> Any:
    """The outputs of a custom Function without parameters: the ops inside it were followed, but an
    input that it returns as it is becomes a new tensor object."""
    for o in out if isinstance(out, (tuple, list)) else (out,):
        if not isinstance(o, Tensor) or recording.state(o) is not None:
            continue
        for t, tag in tagged:
            if o.shape == t.shape and o.stride() == t.stride() and o.data_ptr() == t.data_ptr():
                recording.mark(o, tag)
                break
        else:
            name = f"{cls.__name__}.apply"
            if name in FAMILIES:
                call = Call(cls.apply, name, (), {}, tagged, [], recording.batch_size)
                recording.mark(o, infer(call, [o])[0])
            elif o.is_floating_point():
                what = (
                    "activations become a DTensor, which is not followed. Sequence and context "
                    "parallelism are not covered; use tensor parallelism (docs/scale.md) or FSDP2."
                    if cls.__module__.startswith("torch.distributed.tensor")
                    else f"the ops inside {name} cannot be followed; if it treats the rows of "
                    f"dimension 0 independently, say so with dptorch.tape.rowwise({name!r})."
                )
                recording.mark(o, Mixed(f"{recording.module_path()}: {what}"))
    return out


def _generator(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    recording = innermost()
    if recording is not None:
        inputs = args[4:]  # preserve_rng_state, context_fn, determinism_check, debug, (early_stop)
        fn = _recorded(fn, (inputs, kwargs), recording)
    return _plain_generator(fn, *args, **kwargs)


def _recorded(fn: Callable[..., Any], inputs: Any, recording: Recording) -> Callable[..., Any]:
    """`fn`, recorded again when the backward recomputes it, outside the recording."""
    states = [recording.state(t) if isinstance(t, Tensor) else None for t in tree_leaves(inputs)]

    def run(*args: Any, **kwargs: Any) -> Any:
        if any(mode is recording for mode in active_modes()):
            return fn(*args, **kwargs)
        leaves = [t for t in tree_leaves((args, kwargs))]
        for t, state in zip(leaves, states[-len(leaves) :] if leaves else [], strict=False):
            if isinstance(t, Tensor) and state is not None and recording.state(t) is None:
                recording.mark(t, state)
        with recording:
            return fn(*args, **kwargs)

    return run
