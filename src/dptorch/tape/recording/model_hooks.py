"""Module hooks that record every forward pass of a model, for an attached engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from dptorch.errors import warn
from dptorch.tape.gradients.parameter_guard import ParameterGuard
from dptorch.tape.gradients.tape import TapeConfig, TapeListener
from dptorch.tape.recording.batch_dims import BatchDims, tag_inputs
from dptorch.tape.recording.outputs import promote
from dptorch.tape.recording.patches import patched, uncompiled
from dptorch.tape.recording.recording import Recording

__all__ = ["ModelHooks", "hooks_of"]


class ModelHooks:
    """Hooks that record each forward pass of `model` made with gradients enabled.

    Args:
        model: is changed in nothing but its hooks.
        parameters: the trainable parameters to follow, by name.
        batch_dims: see `dptorch.tape.recording.batch_dims.BatchDims`.
        on_forward: called before each recorded forward; returns what its tape is made with.
        first_inputs: called with the arguments of each forward, until it returns True.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, Tensor],
        *,
        batch_dims: BatchDims,
        on_forward: Callable[[], tuple[TapeConfig, TapeListener]],
        first_inputs: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None = None,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.guard = ParameterGuard(parameters, strict=True)
        self._on_forward = on_forward
        self._first_inputs = first_inputs
        self._paused = False
        self._warned = False
        self._open: tuple[Recording, ExitStack] | None = None
        self._batch_dims = batch_dims
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes inside are ordinary: not recorded, not private."""
        before, self._paused = self._paused, True
        try:
            with self.guard.lifted():
                yield
        finally:
            self._paused = before

    def remove(self) -> None:
        """Take all hooks off the model and its parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.guard.remove()

    def __reduce__(self) -> Any:
        """Copies and pickles of the model are ordinary models: their hooks do nothing."""
        return _without_hooks, ()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.parameters:
            self._warn_of_copy(module)
            return None
        if self._open is not None and _calls_of(module) < 2:
            # A KeyboardInterrupt left the last forward without its closing hook.
            self._open[1].close()
            self._open = None
        if self._paused or self._open is not None or not torch.is_grad_enabled():
            return None
        config, listener = self._on_forward()
        recording = Recording(
            self.model, self.parameters, config, guard=self.guard, listener=listener
        )
        tagged = tag_inputs(recording, recording.tag_batch, module, args, kwargs, self._batch_dims)
        if self._first_inputs is not None:
            with self.paused():
                done = self._first_inputs(args, kwargs)
            if done:
                self._first_inputs = None
        stack = ExitStack()
        stack.enter_context(uncompiled())
        stack.enter_context(patched())
        stack.enter_context(recording)
        self._open = recording, stack
        return tagged

    def _warn_of_copy(self, module: nn.Module) -> None:
        if module.training and torch.is_grad_enabled() and not self._warned:
            self._warned = True
            warn(
                "this model is a copy of one that has a privacy engine; the copy has none, and "
                "training it is not private. Make an engine for it, or use torch.no_grad()."
            )

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._open is None or self._paused:
            return None
        recording, stack = self._open
        self._open = None
        stack.close()
        if recording.escaped and not self._warned:
            self._warned = True
            reads = ", ".join(f"{op}() {n} times" for op, n in recording.escaped.items())
            warn(
                f"the model reads values of the batch into Python in its forward pass ({reads}). If "
                "one that depends on several examples enters the computation again, their "
                "gradients mix and the guarantee is void. dptorch.check names the module."
            )
        return promote(output, recording)


def hooks_of(model: nn.Module) -> ModelHooks | None:
    """The hooks that are on `model`, if there are any."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, ModelHooks) and owner.parameters:
            return owner
    return None


def _calls_of(module: nn.Module) -> int:
    """How many calls of `module` are on the stack."""
    frame: FrameType | None = sys._getframe(1)
    calls = 0
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            calls += 1
        frame = frame.f_back
    return calls


def _without_hooks() -> ModelHooks:
    hooks = ModelHooks.__new__(ModelHooks)
    hooks.parameters = {}
    hooks._paused = True
    hooks._warned = False
    hooks._open = None
    return hooks
