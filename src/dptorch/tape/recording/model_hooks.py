"""Module hooks that record every forward pass of a model, for an attached engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from dptorch.errors import ExamplesMixError, NotCoveredError, PrivacyError, warn
from dptorch.tape.gradients.device_cost import keep_freed_memory
from dptorch.tape.gradients.parameter_guard import ParameterGuard
from dptorch.tape.gradients.tape import TapeConfig, TapeListener
from dptorch.tape.provenance.tags import Tag
from dptorch.tape.recording.attached import attach, is_training
from dptorch.tape.recording.batch_dims import BatchDims, map_batched, tag_inputs
from dptorch.tape.recording.batches import Batch, latest_batch, own_batch
from dptorch.tape.recording.compiled import run_as_written, uncompiled
from dptorch.tape.recording.escapes import refuse_swallowed
from dptorch.tape.recording.in_front import note_generated, refuse_trained_in_front
from dptorch.tape.recording.outputs import follow, outputs_of
from dptorch.tape.recording.padding import Padding, tensors
from dptorch.tape.recording.patches import patch, unpatch
from dptorch.tape.recording.places import way_out_of_a_trainer
from dptorch.tape.recording.read_numbers import read_numbers
from dptorch.tape.recording.recording import Recording
from dptorch.tape.recording.tensor_states import batch_of, owners_of, refuse_trained, tag_of
from dptorch.tape.recording.unseen import (
    refuse_modes,
    refuse_saved_tensor_hooks,
    refuse_saved_tensor_hooks_while,
)

__all__ = ["ModelHooks", "hooks_of"]


class ModelHooks:
    """Hooks that record each forward pass of `model` made with gradients enabled.

    Args:
        model: is changed in nothing but its hooks.
        parameters: the trainable parameters to follow, by name.
        batch_dims: see `dptorch.tape.recording.batch_dims.BatchDims`.
        on_forward: called before each recorded forward; returns what its tape is made with.
        checks: each is called with the arguments of each forward, until it returns True.
        around: makes what each recorded forward runs in.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, Tensor],
        *,
        batch_dims: BatchDims,
        on_forward: Callable[[], tuple[TapeConfig, TapeListener]],
        checks: Sequence[Callable[[tuple[Any, ...], dict[str, Any]], bool]] = (),
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.guard = ParameterGuard(parameters, strict=True)
        self._on_forward = on_forward
        self._around = around
        self._checks = list(checks)
        self._looks_at_padding = bool(checks)
        self._paused = self._public = False
        self._warned = self._warned_of_public = False
        self._open: tuple[Recording, ExitStack] | None = None
        self._outer_error: BaseException | None = None  # that is handled around the forward
        self._batch_dims = batch_dims
        self._batch: Batch | None = None
        from dptorch.tape.recording.constructors import follow_constructors

        follow_constructors()
        refuse_saved_tensor_hooks_while(lambda: is_training() and latest_batch() is not None)
        attach(self)
        run_as_written()
        patch()
        keep_freed_memory()
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes inside are ordinary: not recorded, not private."""
        before, self._paused = self._paused, True
        try:
            with self.guard.suspended():
                yield
        finally:
            self._paused = before

    @contextmanager
    def public(self) -> Iterator[None]:
        """`paused`, for data that is not private."""
        before, self._public = self._public, True
        try:
            with self.paused():
                yield
        finally:
            self._public = before

    def begin_batch(self, rows: int) -> None:
        """The loader hands out a batch of `rows` rows; the forward passes to come are on it."""
        self._batch = own_batch(rows, handed_out=True)

    def taint(self, items: Any, alone: Sequence[Any] = ()) -> tuple[Any, frozenset[str]]:
        """Say that `items` hold the rows of the batch that was begun last.

        Args:
            alone: some examples, each collated without others.

        Returns:
            The batch to hand out, and what of it cannot be followed, in words.
        """
        if self._batch is None or not self._handles:
            return items, frozenset()
        from dptorch.tape.recording.handed_out import taint

        items, unknown = taint(items, self._batch, self.model, alone, self._batch_dims)
        if self._looks_at_padding:
            self._batch.padding = Padding(items, alone)
        return items, unknown

    def end_batch(self) -> None:
        """Forward passes to come are on batches of unknown origin."""
        self._batch = None

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take all hooks off the model and its parameters."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            unpatch()
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
        if self._paused or self._open is not None:
            if self._public and torch.is_grad_enabled():
                self._warn_of_private_rows(args, kwargs)
            return None
        training = torch.is_grad_enabled()
        if training:
            _refuse_transforms()
        leaves: list[tuple[Tensor, int]] = []
        map_batched(lambda t, d: leaves.append((t, d)), module, args, kwargs, self._batch_dims)
        if not training and not module.training and all(batch_of(t) is None for t, _ in leaves):
            return None  # evaluation on data of unknown origin
        batch = self._batch_of(leaves)
        if training:
            refuse_saved_tensor_hooks("around the model")
            refuse_modes("around the model")
            for t, _ in leaves:
                refuse_trained_in_front(t)
                _refuse_read_number(t)
            config, listener = self._on_forward()
            recording = Recording(
                self.model,
                self.parameters,
                config,
                guard=self.guard,
                listener=listener,
                batch=batch,
            )
        else:
            recording = Recording(self.model, {}, batch=batch, strict=False)
        if training:
            recording.states.generated = note_generated(recording, (t for t, _ in leaves))
        seen_before = any(batch_of(t) is batch for t, _ in leaves) or batch.cut_from is not None
        tagged = tag_inputs(recording, _tagger(recording), module, args, kwargs, self._batch_dims)
        recording.tape.rows, recording.tape.seen_before = batch.origin(), seen_before
        recording.tape.padding = batch.padding
        if training and self._checks:
            with self.paused():
                self._checks = [check for check in self._checks if not check(args, kwargs)]
        stack = ExitStack()
        stack.enter_context(uncompiled())
        if training:
            stack.enter_context(self._around())
        stack.enter_context(recording)
        self._open = recording, stack
        self._outer_error = sys.exc_info()[1]
        return tagged

    def _batch_of(self, leaves: Sequence[tuple[Tensor, int]]) -> Batch:
        """The rows that the next forward pass is made on.

        Raises:
            PrivacyError: if they are rows of an earlier batch of the loader.
        """
        known = {id(b): b for t, _ in leaves if (b := batch_of(t)) is not None}
        sizes = {t.shape[d] for t, d in leaves}
        if known:
            batch = next(iter(known.values()))
            whole_batch = batch if batch.cut_from is None else batch.cut_from[0]
            for t, _ in leaves:
                refuse_trained(t)
            if batch.handed_out and self._batch not in (None, batch, whole_batch):
                raise PrivacyError(
                    "the model was given rows of an earlier batch than the one that the loader "
                    "handed out last. What is kept from one step may not enter the next, and a batch "
                    "that is fetched ahead counts as the last. A forward "
                    "pass on what is not private (noise that is drawn once, for pictures) goes into "
                    "`with engine.public():`." + way_out_of_a_trainer()
                )
            t, dim = next((t, d) for t, d in leaves if batch_of(t) is batch)
            tag, whole = tag_of(t), Tag(dim % t.dim()) if batch.size > 1 else Tag(None, 0)
            if tag is None or tag == whole:
                return batch
            # Rows of a batch that were put in another order, or of an earlier batch of the user's
            # own that were cut out anew, are a batch of their own.
            chosen, all_rows = owners_of(t, tag, batch.size), tuple(range(batch.size))
            if batch.handed_out and (chosen == all_rows or tuple(sorted(chosen)) != all_rows):
                return batch  # rows that are missing or there twice are refused
            cut = own_batch(batch.size if batch.handed_out else 0, handed_out=batch.handed_out)
            cut.cut_from = batch, chosen
            return cut
        elif self._batch is not None and (not sizes or sizes == {self._batch.size}):
            return self._batch
        elif (latest := latest_batch()) is not None and sizes == {latest.size}:
            return latest
        return own_batch()

    def _warn_of_private_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches = (batch_of(t) for t in tensors((args, kwargs)))
        if not self._warned_of_public and any(b is not None and b.handed_out for b in batches):
            self._warned_of_public = True
            warn(
                "rows of engine.loader go through the model inside engine.public(), where gradients "
                "are neither clipped nor noised: nothing protects what they are used for. public() is "
                "for data that is not private. To look at predictions of private rows, use "
                "torch.no_grad()."
            )

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
        if sys.exc_info()[1] is not self._outer_error:
            return None  # the forward pass ends with an error
        refuse_swallowed(recording)
        if recording.strict and recording.escaped and not self._warned:
            self._warned = True
            reads = ", ".join(
                f"{op}, {n} time{'s' if n > 1 else ''}" for op, n in recording.escaped.items()
            )
            warn(
                f"library code of the model reads values of the batch into Python ({reads}). It is "
                "taken to choose between computations that give every example the same result, and "
                "the statement assumes so. If one example could decide there what is computed for "
                "another, the guarantee would not hold: dptorch.check(model, batch, loss) measures "
                "whether it does, on your batch."
            )
        return outputs_of(output, recording)


def _refuse_read_number(t: Tensor) -> None:
    """Raise if an input of unknown origin is filled with a number that was read from the batch.

    Raises:
        ExamplesMixError: then; the number is of all examples, and the rows look like one each.
    """
    if batch_of(t) is None and read_numbers.filled(t) is not None:
        raise ExamplesMixError(
            f"an input of the model, of shape {tuple(t.shape)}, is filled with a number that was read "
            "from the batch (item(), float()), or with a function of it. Compute what each example is "
            "given from its own row, or from constants."
        )


def _refuse_transforms() -> None:
    """Raise where a training forward runs inside a backward, or inside torch.func.

    Raises:
        NotCoveredError: then; torch's own errors would name parts of the recording.
    """
    if torch._C._current_graph_task_id() != -1:
        raise NotCoveredError(
            "the private model is called inside a backward pass, as a checkpoint around the whole "
            "model does. Put checkpoints around parts of it, in its forward()."
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotCoveredError(
            "the private model is called inside torch.func (jvp, vmap, grad, ...), which its gradients "
            "cannot be followed through. Call it as it is, or under torch.no_grad()."
        )


def _tagger(recording: Recording) -> Callable[[Tensor, int], Tensor]:
    """Tags an input, and lets whatever else is computed from it be followed."""

    def tag(t: Tensor, dim: int) -> Tensor:
        used = recording.tag_batch(t, dim)
        if used is t and type(t) is Tensor:
            with torch._C.DisableTorchFunction():
                used = t.view_as(t)  # the model gets a plain tensor
            recording.mark(used, recording.state(t))
            follow(t, recording)
        elif t.is_leaf and t.requires_grad and type(t) is Tensor:
            recording.mark(t, recording.state(used))  # its gradient may be asked for
            follow(t, recording)
        return used

    return tag


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
    hooks._public = False
    hooks._warned = False
    hooks._open = None
    hooks._handles = []
    return hooks
