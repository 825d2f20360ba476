"""Raise if autograd ever reaches a parameter that the tape is to follow.

The recording detaches parameters, so autograd reaches one only through code that the recording
cannot see: TorchScript, a custom autograd.Function, a use outside the recorded forward pass. Without
the guard such a use would put a raw gradient of the batch into ``.grad``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dptorch.errors import NotCoveredError

__all__ = ["ParameterGuard"]


class ParameterGuard:
    """Hooks on parameters.

    Args:
        parameters: by name.
        strict: raise on any gradient. Otherwise only in a backward that also reaches the tape, so
            that ordinary training of the same model stays possible.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, strict: bool) -> None:
        self.strict = strict
        self._suspended = False
        self._tape_task = -1
        self._leaked: dict[int, str] = {}
        me = weakref.ref(self)
        self._handles = [p.register_hook(_hook(me, n)) for n, p in parameters.items()]
        weakref.finalize(self, _remove, self._handles)

    def reached(self, name: str) -> None:
        """Autograd computes a gradient of parameter `name`."""
        if self._suspended:
            return
        task = torch._C._current_graph_task_id()
        if self.strict or task == self._tape_task:
            raise _leak(name)
        self._leaked = {task: name}

    def tape_fired(self) -> None:
        """The tape saw a gradient in the backward that runs now."""
        self._tape_task = torch._C._current_graph_task_id()
        name = self._leaked.pop(self._tape_task, None)
        if name is not None and self._tape_task != -1:
            raise _leak(name)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let gradients through: while the tape itself differentiates param-only tensors, and for
        training on public data."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    def remove(self) -> None:
        """Take the hooks off."""
        _remove(self._handles)


def _hook(guard: weakref.ref[ParameterGuard], name: str) -> Callable[[Tensor], None]:
    def hook(_: Tensor) -> None:
        alive = guard()
        if alive is not None:
            alive.reached(name)

    return hook


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _leak(name: str) -> NotCoveredError:
    return NotCoveredError(
        f"autograd reached parameter '{name}' directly, past the tape: it is used by code that a "
        "recording cannot see (TorchScript, a custom autograd.Function that closes over it, or a "
        "use outside the model's forward pass). Its gradient was not kept. Call model(...) itself, "
        "eagerly (what its other methods or its layers compute belongs into forward), pass the "
        "parameter to the Function as an argument, or freeze it with requires_grad_(False)."
    )
