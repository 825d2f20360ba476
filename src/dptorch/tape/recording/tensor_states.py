"""What a recording knows of each tensor: kept with the tensor, good for one recording."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dptorch.errors import ConfigurationError, ExamplesMixError, NotCoveredError
from dptorch.tape.gradients.tape import Tape
from dptorch.tape.provenance.aliases import Aliases, storage_of
from dptorch.tape.provenance.tags import Mixed, ParamOnly, Reduced, State, Tag

__all__ = ["States"]

_STATE = "_dptorch_state"


class _Token:
    """Whose a tensor's state is: each recording has one."""

    __slots__ = ("batch_size",)

    def __init__(self) -> None:
        self.batch_size = 0


class States(TorchFunctionMode):
    """The tensor states of one recorded forward pass, and the words for them.

    Args:
        model: names modules and parameters in messages.
        tape: follows its parameters.

    Attributes:
        tape: filled when gradients arrive.
        batch_size: number of examples B; 0 until a batch was tagged.
    """

    def __init__(self, model: nn.Module, tape: Tape) -> None:
        super().__init__()
        self.model = model
        self.tape = tape
        self.batch_size = 0
        self._followed = tape.names
        self._token = _Token()
        self._aliases = Aliases()
        self._depth = 0
        self._owned: dict[int, str] | None = None

    def __enter__(self) -> States:
        self._depth += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        self._depth -= 1
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    # -- states -----------------------------------------------------------------------------------

    def state(self, t: Tensor) -> State | None:
        """What is known of a tensor, or None for a constant.

        Raises:
            NotCoveredError: for a tensor that carries the examples of another recording.
        """
        entry = getattr(t, _STATE, None)
        if entry is None:
            state, clock = None, 0
        elif entry[0] is self._token:
            state, clock = entry[1], entry[2]
        else:
            state, clock = self._foreign(t, entry), 0
        if self._aliases.clock and clock < self._aliases.clock:
            now = self._aliases.now(t, clock, state, self.batch_size)
            if isinstance(state, Tag) and isinstance(now, Tag) and now != state and t.requires_grad:
                now = Mixed(
                    f"{self.module_path()}: other examples were written into a tensor behind the "
                    "back of autograd, or through a view."
                )
            state = now
            if entry is not None or state is not None:
                setattr(t, _STATE, (self._token, state, self._aliases.clock))
        return state

    def _foreign(self, t: Tensor, entry: tuple[Any, ...]) -> State | None:
        token, state = entry[0], entry[1]
        if isinstance(state, ParamOnly) or state is None or not t.is_floating_point():
            return None
        if self._depth == 0 and token.batch_size == self.batch_size and not t.requires_grad:
            return state
        if t.is_leaf and t.requires_grad and not isinstance(state, Mixed):
            return None
        raise NotCoveredError(
            f"{self.module_path()}: a tensor of shape {tuple(t.shape)} holds the examples of another "
            "forward pass (a hidden state or a statistic kept from an earlier step, or another "
            "model's output). What one step's examples leave behind may not enter the next. If it "
            "belongs to the same examples, pass it as an argument of the model."
        )

    def mark(self, t: Any, state: State | None) -> None:
        """Say what a tensor is. A mixed tensor raises if a gradient ever passes it."""
        if not isinstance(t, Tensor):
            return
        setattr(t, _STATE, (self._token, state, self._aliases.clock))
        if isinstance(state, Mixed) and t.requires_grad and not t.is_leaf:
            reason = state.reason

            def poison(_: Tensor) -> None:
                raise ExamplesMixError(reason)

            t.register_hook(poison)

    def mark_written(self, t: Tensor, before: State | None, after: State | None) -> None:
        """Say what a tensor is after it was written to in place.

        Raises:
            NotCoveredError: if examples were written into a parameter or a buffer of the model.
        """
        if isinstance(after, (Tag, Reduced, Mixed)) and not isinstance(
            before, (Tag, Reduced, Mixed)
        ):
            if self._owned is None:
                named = [*self.model.named_buffers(), *self.model.named_parameters()]
                self._owned = {storage_of(b): n for n, b in named}
            name = self._owned.get(storage_of(t))
            if name is not None:
                raise NotCoveredError(
                    f"{self.module_path()}: '{name}' is overwritten with values of the batch. What "
                    "the examples of one step leave in a parameter or buffer (running statistics, "
                    "code books, queues) enters later steps without noise. Freeze it (eval mode, "
                    "momentum 0), or compute it anew in each forward pass."
                )
        if isinstance(after, ParamOnly):
            self.mark(t, after)
            return
        self._aliases.wrote(t, before, after, self.batch_size)
        self.mark(t, after)

    def tag_batch(self, t: Tensor, dim: int = 0) -> Tensor:
        """Declare that the examples of the batch lie along `dim` of `t`; returns the tensor to use.

        Raises:
            ConfigurationError: if the size disagrees with another input's.
        """
        size = t.shape[dim]
        if self.batch_size and size != self.batch_size:
            raise ConfigurationError(
                f"an input of shape {tuple(t.shape)} has {size} examples along dimension {dim}, "
                f"another had {self.batch_size}. Inputs of one forward pass must hold the same "
                "examples; name the batch dimension of each with batch_dims=, None for inputs "
                "that are not batched."
            )
        if size == 0:
            raise ConfigurationError(
                "the batch is empty. An empty Poisson batch is a step of its own: use the engine's "
                "loader, which turns it into a padding example of weight zero."
            )
        self.batch_size = self._token.batch_size = size
        self.tape.note_batch(size)
        if t.requires_grad or isinstance(t, nn.Parameter):
            with torch._C.DisableTorchFunction():
                t = t.view_as(t)  # another recording's output keeps its own state
        self.mark(t, Tag(dim % t.dim()) if size > 1 else Tag(None, 0))
        return t

    def untransposed(self, p: Tensor) -> tuple[Tensor, bool]:
        """(the parameter that `p` is the transpose of, True), or (p, False)."""
        state = self.state(p)
        if isinstance(state, ParamOnly) and state.transposed is not None:
            return state.transposed, True
        return p, False

    # -- messages ---------------------------------------------------------------------------------

    def describe(self, p: Tensor) -> str:
        """A parameter's name, for messages."""
        name = self.tape.names.get(id(p))
        return (
            f"parameter '{name}'" if name else f"a tensor computed from parameters {tuple(p.shape)}"
        )

    def module_path(self) -> str:
        """The module whose forward is running, found by walking the stack: only errors pay for it."""
        names = {id(m): n for n, m in self.model.named_modules()}
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in names:
                name = names[id(owner)]
                kind = type(owner).__name__
                return f"module '{name}' ({kind})" if name else f"the model ({kind})"
            frame = frame.f_back
        return "outside the model"

    def statistic(self, name: str) -> Mixed:
        """The state of a statistic over the examples."""
        return Mixed(f"{self.module_path()}: '{name}' takes a statistic over the examples.")
