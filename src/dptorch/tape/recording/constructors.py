"""Constructors that make a tensor of another, which torch hands to no tensor subclass.

``torch.tensor(t)``, ``torch.as_tensor(t, dtype=...)`` and ``torch.autograd.Variable(t)`` return plain
tensors whatever the class of `t` is. So they are replaced, once, when the first model is hooked; of
anything but a followed tensor they make what they made before. ``torch.Tensor(t)`` cannot be replaced
(torch.compile depends on it) and is not followed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.jit._builtins as script
from torch import Tensor
from torch.autograd import Variable
from torch.utils._device import _device_constructors

from dptorch.tape.recording.handlers import SPECIAL
from dptorch.tape.recording.outputs import RecordedTensor, made_from
from dptorch.tape.recording.recording import innermost

__all__ = ["follow_constructors"]

_FUNCTIONS = ("tensor", "as_tensor", "asarray")
_done = False


def follow_constructors() -> None:
    """Let the constructors return followed tensors for followed tensors."""
    global _done
    if _done:
        return
    _done = True
    # ``with torch.device(...)`` knows constructors by identity, from a table made when first asked for:
    # asked now, it holds those that the replacements call.
    _device_constructors()
    for name in _FUNCTIONS:
        plain = getattr(torch, name)
        followed = _function(plain)
        setattr(torch, name, followed)
        if script._builtin_table is not None and name != "asarray":
            script._register_builtin(followed, f"aten::{name}")
    Variable.__new__ = _new(Variable.__new__)  # type: ignore[method-assign]


def _function(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def make(*args: Any, **kwargs: Any) -> Any:
        made = plain(*args, **kwargs)
        data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
        if isinstance(data, RecordedTensor):
            # Inside a recorded forward pass its function mode has seen the call.
            return made if made is data or innermost() is not None else made_from(data, made)
        if not isinstance(data, (list, tuple)):
            return made
        if any(isinstance(v, RecordedTensor) for v in data) and innermost() is None:
            numbers = [v.detach() if isinstance(v, Tensor) else plain(v) for v in data]
            stacked = torch.stack([v.reshape(()) for v in numbers])
            if isinstance(stacked, RecordedTensor):
                return made_from(stacked, made)
        return made

    return make


def _new(plain: Callable[..., Any]) -> Any:
    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = plain(cls, *args, **kwargs)
        data = args[0] if args else kwargs.get("data")
        if isinstance(data, Tensor):
            recording = innermost()
            if recording is not None:
                SPECIAL["tensor"](recording, lambda _: made, "tensor", (data,), {})
            elif isinstance(data, RecordedTensor):
                return made_from(data, made)
        return made

    return staticmethod(new)
