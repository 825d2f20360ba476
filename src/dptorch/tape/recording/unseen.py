"""Catch what no torch function mode sees: other threads, TorchScript, DLPack, hooks on saved tensors,
modes of the user's own.

A mode is the thread's own, and TorchScript and DLPack take tensors without asking it. While a model is
recorded these are replaced by functions that ask first; other threads are not affected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import torch
import torch.nested
from torch.autograd.graph import saved_tensors_hooks
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves

from dptorch.errors import NotCoveredError
from dptorch.tape.provenance.calls import each_tensor
from dptorch.tape.provenance.tags import Mixed, Reduced, Tag
from dptorch.tape.recording.escapes import note_error
from dptorch.tape.recording.places import user_line
from dptorch.tape.recording.reads import is_trusted, note_read
from dptorch.tape.rules.recorder import Recorder

__all__ = [
    "refuse_modes",
    "refuse_saved_tensor_hooks",
    "refuse_saved_tensor_hooks_while",
    "script",
    "watch",
]

_Innermost = Callable[[], Recorder | None]
_depth = 0
# What is replaced: the owner, its attribute, its own value of it (None if inherited), and the guard.
_replaced: list[tuple[Any, str, Any, Any]] = []


def watch(innermost: _Innermost) -> Callable[[], None]:
    """Begin to watch; returns what ends it.

    Args:
        innermost: gives the recording that is active in the thread that calls it.
    """
    global _depth
    if _depth == 0:
        # Made once, and anew where somebody else has replaced one of them since.
        if any(vars(o).get(n) is not own for o, n, own, _ in _replaced) or not _replaced:
            _replaced[:] = _replacements(innermost)
        for owner, name, _, guarded in _replaced:
            setattr(owner, name, guarded)
    _depth += 1
    return _end


def _end() -> None:
    global _depth
    _depth -= 1
    if _depth == 0:
        for owner, name, original, _ in _replaced:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _replacements(innermost: _Innermost) -> Iterator[tuple[Any, str, Any, Any]]:
    for owner, name, guard in (
        (threading.Thread, "start", _thread),
        (ThreadPoolExecutor, "submit", _thread),
        (torch.utils.dlpack, "to_dlpack", _memory),
        (torch, "to_dlpack", _memory),
        (saved_tensors_hooks, "__enter__", _hooks),
        (torch.Tensor, "as_subclass", _same_values),
        (torch.Tensor, "_make_subclass", _same_values),
        (torch.nested, "nested_tensor", _nested),
        (torch.nested, "as_nested_tensor", _nested),
        (Distribution, "__init__", _validation),
        (Distribution, "_validate_sample", _validation),
    ):
        guarded = _guarded(getattr(owner, name), guard, innermost)
        static = name == "_make_subclass"
        yield owner, name, vars(owner).get(name), staticmethod(guarded) if static else guarded


def _guarded(original: Any, guard: Any, innermost: _Innermost) -> Any:
    @wraps(original)
    def asked(*args: Any, **kwargs: Any) -> Any:
        recording = innermost()
        if recording is None or not recording.refuses_reads:
            return original(*args, **kwargs)
        return guard(recording, original, args, kwargs)

    return asked


def _thread(recording: Recorder, original: Any, args: Any, kwargs: Any) -> Any:
    if not is_trusted():
        raise NotCoveredError(
            f"{recording.module_path()}, {user_line()}: a thread is given work in a forward pass, and "
            "what another thread computes is not followed. Compute it in the thread of the model; if "
            "it touches no values of the batch, do this inside dptorch.tape.trusted_reads()."
        )
    return original(*args, **kwargs)


def _memory(recording: Recorder, original: Any, args: Any, kwargs: Any) -> Any:
    note_read(recording, "to_dlpack", map(recording.state, each_tensor(args, kwargs)))
    return original(*args, **kwargs)


def script(recording: Recorder, call: Any, args: Any, kwargs: Any, *, inside: bool = True) -> Any:
    """TorchScript: nothing inside is seen, so all examples of its arguments may be in its results.

    Args:
        inside: of a model, where a gradient that is not followed is refused.
    """
    states = [recording.state(t) for t in each_tensor(args, kwargs)]
    out = call(*args, **kwargs)
    if any(isinstance(s, (Tag, Mixed, Reduced)) for s in states):
        for o in tree_leaves(out):
            if isinstance(o, torch.Tensor):
                if recording.state(o) is None and not (o.requires_grad and inside):
                    recording.mark(o, Mixed(f"{recording.module_path()}: {_SCRIPT}"))
            elif o is not None:
                note_read(recording, "TorchScript", states)
    return out


def _same_values(recording: Recorder, original: Any, args: Any, kwargs: Any) -> Any:
    """A tensor of another class that shares the values of one."""
    out = original(*args, **kwargs)
    source = next((a for a in args if isinstance(a, torch.Tensor)), None)
    if source is not None:
        recording.mark(out, recording.state(source))
    return out


def _nested(recording: Recorder, original: Any, args: Any, kwargs: Any) -> Any:
    if any(recording.state(t) is not None for t in each_tensor(args, kwargs)) and not is_trusted():
        raise NotCoveredError(
            f"{recording.module_path()}, {user_line()}: a nested tensor is made of rows of the batch, "
            "which are not followed there. Use a padded tensor and a mask."
        )
    return original(*args, **kwargs)


def _validation(recording: Recorder, original: Any, args: Any, kwargs: Any) -> Any:
    """A distribution that looks at its values and may refuse them, which the model may catch."""
    try:
        return original(*args, **kwargs)
    except ValueError as error:
        values = [*args[1:], *kwargs.values(), *vars(args[0]).values()]
        note_error(recording, error, tuple(values), {})
        raise


_SCRIPT = "the ops inside a TorchScript function cannot be followed. Call what it was made from."


def _hooks(recording: Recorder, original: Any, args: Any, kwargs: Any) -> Any:
    if (
        type(args[0]).__module__.partition(".")[0] != "torch"
        or type(args[0]) is saved_tensors_hooks
    ):
        _refuse_hooks(args[0].pack_hook, recording.module_path())
    return original(*args, **kwargs)


def refuse_saved_tensor_hooks(where: str) -> None:
    """Raise if hooks of the user's own pack what autograd saves.

    Raises:
        NotCoveredError: they see all examples at once, and no function mode sees them run.
    """
    active = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if active is not None:
        _refuse_hooks(active[0], where)


def refuse_saved_tensor_hooks_while(training: Callable[[], bool]) -> None:
    """Refuse hooks of the user's own that are set while `training`, around a loss for example."""
    if saved_tensors_hooks.__enter__.__module__ == __name__:
        return
    plain: Any = saved_tensors_hooks.__enter__

    def enter(self: saved_tensors_hooks) -> Any:
        own = type(self) is saved_tensors_hooks or type(self).__module__.split(".")[0] != "torch"
        if own and training():
            _refuse_hooks(self.pack_hook, "around a loss")
        return plain(self)

    saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]


def refuse_modes(where: str) -> None:
    """Raise if a mode of the user's own changes what torch functions or operators compute.

    Raises:
        NotCoveredError: it sees all examples at once, below what is recorded.
    """
    modes = [
        *torch.overrides._get_current_function_mode_stack(),
        *torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    ]
    for mode in modes:
        if type(mode).__module__.partition(".")[0] not in ("torch", "dptorch") and not is_trusted(
            ()
        ):
            raise NotCoveredError(
                f"{where}, {user_line()}: the mode {type(mode).__name__} may change what is computed "
                "for all examples, and what it does is not followed. Leave it before the model is "
                "called; if it only looks on, enter it inside dptorch.tape.trusted_reads()."
            )


def _refuse_hooks(pack: Any, where: str) -> None:
    owner = str(getattr(pack, "__module__", "")).partition(".")[0]
    if owner in ("torch", "dptorch") or is_trusted(()):
        return
    raise NotCoveredError(
        f"{where}, {user_line()}: saved_tensors_hooks change what the backward of all examples "
        "computes with, and what they do is not followed. Leave them out, or use torch's own "
        "(save_on_cpu, checkpoint); if they give back what they were given, enter them inside "
        "dptorch.tape.trusted_reads()."
    )
