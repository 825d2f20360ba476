"""What is known of each tensor: kept with the tensor, good for one physical batch."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dptorch.errors import ConfigurationError, ExamplesMixError, NotCoveredError, PrivacyError
from dptorch.tape.provenance.aliases import storage_of
from dptorch.tape.provenance.calls import each_tensor
from dptorch.tape.provenance.tags import Mixed, ParamOnly, Reduced, State, Tag, owners
from dptorch.tape.recording.batches import Batch
from dptorch.tape.recording.places import (
    OUTSIDE,
    module_path,
    user_line,
    way_out_of_a_trainer,
)

__all__ = [
    "FOLLOWED",
    "GUESSED",
    "TRAINED",
    "TensorStates",
    "batch_of",
    "is_followed",
    "owners_of",
    "recording_of",
    "refuse_trained",
    "tag_of",
]

_STATE = "_dptorch_state"
#: Holds the recording of a tensor that is followed outside of models.
FOLLOWED = "_dptorch_recording"
#: Set on a tensor that was taken for rows of the batch because of its shape: to "loader" on one that
#: the loader handed out, to "loss" on one of unknown origin that met the batch in the loss.
GUESSED = "_dptorch_guessed"
#: What is known of a tensor that was trained on a batch, or in which values of one were kept, without
#: an engine, and of all that is computed from it: in every batch.
_TRAINED = (
    "a value was computed with parameters that a model without an engine trains on the same data, "
    "without noise, so that it shows the examples of earlier steps. Make an engine for that model too, "
    "or train it on public data."
)
TRAINED = Mixed(_TRAINED)


def is_followed(t: Tensor) -> bool:
    """Whether what is computed from a tensor is followed outside of models too."""
    return hasattr(t, FOLLOWED)


def recording_of(values: Any) -> Any:
    """Return the recording of the first tensor in `values` that is followed outside of models."""
    found = (t for t in each_tensor(tuple(values), {}) if is_followed(t))
    return next((getattr(t, FOLLOWED) for t in found), None)


def batch_of(t: Tensor) -> Batch | None:
    """The batch that a tensor is known to hold values of; None for one of unknown origin."""
    entry = getattr(t, _STATE, None)
    if entry is None or entry[1] is None or isinstance(entry[1], ParamOnly):
        return None
    batch: Batch = entry[0].batch
    return batch


def tag_of(t: Tensor) -> Tag | None:
    """The tag that a tensor has in its batch; None if it has none."""
    state = getattr(t, _STATE, (None, None))[1]
    return state if isinstance(state, Tag) else None


def refuse_trained(t: Tensor) -> None:
    """Raise if an input of the model was computed with what was trained without an engine.

    Raises:
        ExamplesMixError: in whichever step that was.
    """
    if getattr(t, _STATE, (None, None))[1] == TRAINED:
        raise ExamplesMixError(f"an input of the model mixes examples of the batch. {_TRAINED}")


class TensorStates:
    """The tensor states of one recorded forward pass.

    Args:
        model: names modules in messages; its buffers may not be written to.
        batch: the rows that the forward pass is made on.
        strict: whether a gradient that passes a mixed tensor raises.

    Attributes:
        depth: how often the recording is entered; 0 once the model has returned.
    """

    def __init__(self, model: nn.Module, batch: Batch, *, strict: bool = True) -> None:
        self.model = model
        self.batch = batch
        self.depth = 0
        self._strict = strict
        self._aliases = batch.aliases
        self._owned: dict[int, str] | None = None

    def state(self, t: Tensor) -> State | None:
        """Return what is known of a tensor, or None for a constant."""
        entry = getattr(t, _STATE, None)
        if entry is None:
            state, clock = None, 0
        elif entry[0] is self:
            state, clock = entry[1], entry[2]
        elif entry[0].batch is self.batch:
            # A param-only tensor belongs to the graph of its own forward pass.
            state, clock = (None, 0) if isinstance(entry[1], ParamOnly) else (entry[1], entry[2])
        else:
            state, clock = self._foreign(t, entry), 0
        if self._aliases.clock and clock < self._aliases.clock:
            now = self._aliases.now(t, clock, state, self.batch.size)
            if isinstance(state, Tag) and isinstance(now, Tag) and now != state and t.requires_grad:
                now = Mixed(
                    f"{self.module_path()}: other examples were written into a tensor behind the "
                    "back of autograd, or through a view."
                )
            state = now
            if entry is not None or state is not None:
                setattr(t, _STATE, (self, state, self._aliases.clock))
        return state

    def known(self, tensors: Sequence[Tensor]) -> list[State | None]:
        """Return the `state` of each."""
        if self._aliases.clock:
            return [self.state(t) for t in tensors]
        found: list[State | None] = []
        for t in tensors:
            entry = getattr(t, _STATE, None)
            if entry is None:
                found.append(None)
            else:
                found.append(entry[1] if entry[0] is self else self.state(t))
        return found

    def _foreign(self, t: Tensor, entry: tuple[Any, ...]) -> State | None:
        """What a tensor that has a state in another batch is in this one."""
        state = entry[1]
        if state == TRAINED:
            return TRAINED
        if isinstance(state, ParamOnly) or state is None or getattr(t, GUESSED, "") == "loss":
            return None
        other: Batch = entry[0].batch
        if t.is_leaf and t.requires_grad and not isinstance(state, Mixed):
            return None
        if not self.batch.size and not other.handed_out:
            return None  # data of the user's own, looked at before any of it was given to the model
        cut_from = self.batch.cut_from
        if cut_from is not None and cut_from[0] is other and isinstance(state, Tag):
            mine = _same_rows(t, state, other.size, cut_from[1])
            if mine is not None:
                return mine if self.batch.size > 1 else Tag(None, 0)
        same_step = not other.spent and not self.batch.spent and other.size == self.batch.size
        if self.depth == 0 and same_step and not (other.handed_out and self.batch.handed_out):
            return state  # two models, each on inputs of its own, in one loss
        # It may be logged, and added up for a log, but not reach a gradient.
        return Mixed(
            f"{self.module_path()}: a tensor of shape {tuple(t.shape)} {_FOREIGN}"
            + way_out_of_a_trainer()
        )

    def mark(self, t: Any, state: State | None) -> None:
        """Say what a tensor is. A mixed tensor raises if a gradient ever passes it."""
        if not isinstance(t, Tensor):
            return
        setattr(t, _STATE, (self, state, self._aliases.clock))
        if self.depth:
            self.batch.made.append(weakref.ref(t))
        if isinstance(state, Mixed) and self._strict and t.requires_grad and not t.is_leaf:
            reason = state.reason

            def poison(_: Tensor) -> None:
                raise ExamplesMixError(reason)

            t.register_hook(poison)

    def note_trained(self, t: Tensor) -> None:
        """Say that a leaf gets the gradient of a loss of the batch and no noise."""
        self.mark(t, TRAINED)
        self.batch.made.append(weakref.ref(t))

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
        self._aliases.wrote(t, before, after, self.batch.size)
        self.mark(t, after)

    def tag_batch(self, t: Tensor, dim: int = 0) -> Tensor:
        """Declare that the examples of the batch lie along `dim` of `t`; returns the tensor to use.

        Raises:
            ConfigurationError: if the size disagrees with another input's.
            ExamplesMixError: if its rows were mixed before.
        """
        cut_from = self.batch.cut_from
        mine = self.batch if cut_from is None else cut_from[0]
        known = self.state(t) if batch_of(t) in (self.batch, mine) else None
        if known is None and dim == 0 and self.batch.left:
            known = self.batch.came_back(t)
        size = t.shape[dim]
        if self.batch.size and size != self.batch.size:
            if self.batch.handed_out:
                raise PrivacyError(
                    f"the model was given {size} rows where the loader handed out "
                    f"{self.batch.size} examples. {ONE_ROW_EACH}"
                )
            raise ConfigurationError(
                f"an input of shape {tuple(t.shape)} has {size} examples along dimension {dim}, "
                f"another had {self.batch.size}. Inputs of one forward pass must hold the same "
                "examples; name the batch dimension of each with batch_dims=, None for inputs "
                "that are not batched."
            )
        if size == 0:
            raise ConfigurationError(
                "the batch is empty. An empty Poisson batch is a step of its own: use the engine's "
                "loader, which turns it into a padding example of weight zero."
            )
        self.batch.size = size
        state = Tag(dim % t.dim()) if size > 1 else Tag(None, 0)
        if isinstance(known, (Mixed, Reduced)):
            reason = known.reason if isinstance(known, Mixed) else "It was reduced over examples."
            raise ExamplesMixError(
                f"an input of the model mixes examples of the batch. {reason} {ONE_ROW_EACH}"
            )
        if isinstance(known, Tag) and known != state and getattr(t, GUESSED, "") != "loader":
            raise PrivacyError(
                f"an input of shape {tuple(t.shape)} does not hold the rows of the batch in their "
                f"order along dimension {dim}. {ONE_ROW_EACH}"
            )
        if t.requires_grad or type(t) is not Tensor:
            with torch._C.DisableTorchFunction():
                t = t.view_as(t)  # another recording's output keeps its own state
        self.mark(t, state)
        return t

    def refuse_vmap(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Raise if an op runs on the examples inside torch.func, where nothing follows them."""
        for t in tensors:
            inner = t
            while torch._C._functorch.is_functorch_wrapped_tensor(inner):
                inner = torch._C._functorch.get_unwrapped(inner)
            if inner is not t and t.is_floating_point() and self.state(inner) is not None:
                raise NotCoveredError(
                    f"{self.module_path()}: '{name}' runs on the examples inside torch.func "
                    "(vmap, grad, ...), where they cannot be followed. Write it with ordinary ops "
                    "on batched tensors."
                )

    def module_path(self) -> str:
        """Name the module whose forward is running, or the line of the loss, for messages."""
        found = module_path(self.model)
        return found if found != OUTSIDE else f"{OUTSIDE}, {user_line()}"

    def statistic(self, name: str) -> Mixed:
        """Return the state of a statistic over the examples."""
        return Mixed(
            f"{self.module_path()}: '{name}' takes a statistic over the examples."
            + way_out_of_a_trainer()
        )


def owners_of(t: Tensor, tag: Tag, batch_size: int) -> tuple[int, ...]:
    """Which row of a batch of `batch_size` each index along ``tag.dim`` is."""
    if tag.dim is None:
        return (tag.step,)
    return tuple(owners(tag, t.shape[tag.dim], batch_size).tolist())


def _same_rows(t: Tensor, tag: Tag, batch_size: int, chosen: tuple[int, ...]) -> Tag | None:
    """The tag in a batch that was cut out of another, of a tensor cut out in the same way."""
    return Tag(tag.dim or 0) if owners_of(t, tag, batch_size) == chosen else None


ONE_ROW_EACH = (
    "Each row must be one example: augmented views of an example go on an axis of their own, so that "
    "its gradients are clipped together, and examples may not be paired, selected or mixed after the "
    "loader."
)
_FOREIGN = (
    "holds the examples of another forward pass (a hidden state, a count or a statistic kept from an "
    "earlier step, or another model's output). What one step's examples leave behind may not enter "
    "the next. If it belongs to the same examples, pass it as an argument of the model; if it is a "
    "buffer that is filled anew for each batch, empty it with zero_() first. A memory bank may hold "
    "public data, or parameters. What the model makes of public data is computed inside `with "
    "engine.public():`, and detached."
)
