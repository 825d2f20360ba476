"""Tensors that remember whose rows they hold, inside and outside the model.

A recording ends with the model's forward, but data comes before and the loss after. What the
engine's loader hands out, what goes into the model and what comes out become `RecordedTensor`s:
ordinary tensors in every respect, whose further ops are followed like those inside the model,
through ``detach``, ``no_grad``, indexing and comparisons. So a loss that mixes examples is refused,
the kind of reduction is known, and ``loss.backward()`` accepts one loss for each example.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dptorch.errors import ConfigurationError, ExamplesMixError
from dptorch.tape.provenance.aliases import is_shared, others_on_memory_of
from dptorch.tape.provenance.calls import each_tensor, info, words
from dptorch.tape.provenance.schemas import bind
from dptorch.tape.provenance.tags import Mixed, Order, Reduced, Tag
from dptorch.tape.recording.batches import Batch
from dptorch.tape.recording.handlers import SPECIAL
from dptorch.tape.recording.in_front import (
    follow_generated,
    generated_by,
    mark_generated,
    refuse_trained_beside,
)
from dptorch.tape.recording.loss_factors import carry_factors, forget_factors
from dptorch.tape.recording.patches import patched
from dptorch.tape.recording.recording import Recording
from dptorch.tape.recording.tensor_states import FOLLOWED, is_followed
from dptorch.tape.recording.unseen import refuse_modes
from dptorch.tape.recording.value_sizes import SIZES_MADE

__all__ = [
    "DEEPEST",
    "RecordedTensor",
    "attributes",
    "beside",
    "follow",
    "follow_kept",
    "leaving",
    "made_from",
    "outputs_of",
    "promote",
    "refuse_mixed",
]

_WRITE_CONSTANTS = words("""copy zero fill __setitem__ .data= set""")  # or may
_KEEP_STATISTICS = words(
    """batch_norm instance_norm native_batch_norm _native_batch_norm_legit
    fused_moving_avg_obs_fake_quant"""
)
#: Objects in objects that are looked into.
DEEPEST = 3


class RecordedTensor(torch.Tensor):
    """A tensor that holds values of a batch, as its copies do. Pickles of it are plain tensors."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        known = info(func)
        if known.passive and not SIZES_MADE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        recorded = [t for t in each_tensor(args, kwargs) if is_followed(t)]
        with torch._C.DisableTorchFunctionSubclass():
            if not recorded:
                return func(*args, **kwargs)
            # That of a model rather than that of its data.
            recording: Recording = getattr(recorded[0], FOLLOWED)
            for t in recorded[1:]:
                other: Recording = getattr(t, FOLLOWED)
                if other.strict and not recording.strict:
                    recording = other
            for t in recorded:
                _adopt(t, recording, known.name)
            if torch._C._len_torch_dispatch_stack() and torch.is_grad_enabled():
                refuse_modes("around what is computed from the batch")
            written = [(t, t._version) for t in each_tensor(args, kwargs) if _may_be_written(t)]
            made = generated_by(recorded)
            with patched():
                out = promote(recording.handle(func, args, kwargs), recording)
            if made:
                follow_generated(recording, known.name, recorded, made, out)
            follow_kept(recording)
            if args and (known.in_place or out is None):
                _follow_written(args[0], recording, all(t is not args[0] for t in recorded))
            kept = known.name in _KEEP_STATISTICS and _statistics_of(func, args, kwargs)
            for t, version in written:
                if t._version != version or (kept and any(t is s for s in kept)):
                    _note_written_beside(t, recording, known.name)
            if recording.strict:
                carry_factors(recording, known.name, args, kwargs, out)
            return out

    def __reduce_ex__(self, proto: Any) -> Any:
        return leaving(self).__reduce_ex__(proto)

    def __copy__(self) -> Tensor:
        return made_from(self, copy.copy(_plain(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        leaf = self.is_leaf and self.requires_grad
        with torch._C.DisableTorchFunction():
            made = copy.deepcopy(self.detach() if leaf else _plain(self), memo).requires_grad_(leaf)
        memo[id(self)] = made
        if hasattr(self, "_is_param"):
            made._is_param = True
        return made_from(self, made)

    def __repr__(self, **kwargs: Any) -> Any:  # type: ignore[override]
        return repr(_plain(self))

    def __format__(self, spec: str) -> str:
        return format(_plain(self), spec)


def _plain(t: Tensor) -> Tensor:
    """The same values without what is known of them."""
    with torch._C.DisableTorchFunction():
        if getattr(t, "_is_param", False):
            return nn.Parameter(t.detach(), t.requires_grad)
        return t.view_as(t) if t.requires_grad else t.detach()


def leaving(t: Tensor) -> Tensor:
    """The same values without what is known of them, which may come back."""
    recording: Recording = getattr(t, FOLLOWED)
    recording.states.batch.note_leaving(t, recording.state(t))
    return _plain(t)


def _may_be_written(t: Tensor) -> bool:
    return not is_followed(t) and not t.is_inference()


def _statistics_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    """The running statistics that such a call writes to, which torch does not count."""
    given = bind(func, args, kwargs)
    if "running_min" in given:
        return [given.get(name) for name in ("running_min", "running_max", "scale", "zero_point")]
    if not any(given.get(name) for name in ("training", "train", "use_input_stats")):
        return []
    return [given.get("running_mean"), given.get("running_var")]


def _note_written_beside(t: Tensor, recording: Recording, name: str) -> None:
    """Follow an operand that an op has written to, beside its result or in a list."""
    if is_followed(t):
        return
    if recording.state(t) is None and name not in _WRITE_CONSTANTS:
        recording.mark_written(t, None, recording.statistic(name))
    _follow_written(t, recording, True)


def _follow_written(t: Any, recording: Recording, is_new: bool) -> None:
    """Follow a tensor that examples were written into, by index or through a view or alias of it.

    Args:
        is_new: whether it was not followed before.
    """
    if not isinstance(t, Tensor):
        return
    if type(t) is RecordedTensor and recording.state(t) is None:  # it was filled with a constant
        delattr(t, FOLLOWED)
        t.__class__ = Tensor  # type: ignore[assignment]
    holders = [h for h in (t, t._base) if h is not None]
    if is_new and is_shared(t, len(holders)):
        holders += others_on_memory_of(t)
    for holder in holders:
        if type(holder) in (Tensor, nn.Parameter) and (holder.is_leaf or not holder.requires_grad):
            follow(holder, recording)


def made_from(source: Tensor, made: Tensor) -> Tensor:
    """Say that `made` is a copy or an alias of `source`, a followed tensor; returns it."""
    recording: Recording = getattr(source, FOLLOWED)
    with torch._C.DisableTorchFunctionSubclass():
        SPECIAL["tensor"](recording, lambda _: made, "tensor", (source,), {})
        promoted: Tensor = promote(made, recording)
    return promoted


def _adopt(t: Tensor, recording: Recording, name: str) -> None:
    """Follow another model's output (a generator's, say) in this recording too."""
    other: Recording = getattr(t, FOLLOWED)
    if other is recording:
        return
    if recording.strict and not other.strict and t.requires_grad and not t.is_leaf:
        refuse_trained_beside(recording.states, name, t)
    state = recording.state(t)
    foreign = other.states.batch is not recording.states.batch
    other_size = foreign and t.requires_grad and other.batch_size != recording.batch_size
    if other_size and isinstance(other.state(t), Tag):
        raise ConfigurationError(
            f"outputs for {other.batch_size} and for {recording.batch_size} examples meet in "
            "one loss. Compute a loss for each forward pass, and call backward() on each."
        )
    if state is None or not t.requires_grad:
        return
    if foreign:
        recording.mark(t, state)
    setattr(t, FOLLOWED, recording)
    if other.strict:
        recording.joined += [other.tape, *other.joined]


def follow_kept(recording: Recording) -> None:
    """`promote` what a forward pass, a hook or a custom Function has left behind, in an attribute, a
    list or a closure: whoever reads it there gets values of the batch."""
    for t in recording.states.batch.kept():
        _promote_one(t, recording)


def outputs_of(value: Any, recording: Recording) -> Any:
    """`promote` what a model returned, what its forward has left behind, and what it has kept the
    gradients of."""
    follow_kept(recording)
    promote(recording.retained, recording)
    recording.retained = []
    if recording.states.generated is not None:
        mark_generated(tree_leaves(value), recording.states.generated)
    if recording.batch_size == 1:
        for t in tree_leaves(value):
            if isinstance(t, Tensor) and t.requires_grad and t.numel() == 1:
                forget_factors(t)
    return promote(value, recording)


def promote(value: Any, recording: Recording, depth: int = 0) -> Any:
    """Turn the tensors in `value` that carry examples into RecordedTensors."""
    if isinstance(value, Tensor):
        return _promote_one(value, recording)
    if value is not None and type(value) not in (int, float, bool, torch.Size):
        tree_map(lambda t: _promote_one(t, recording, depth), value)
    return value


def attributes(value: Any) -> dict[str, Any]:
    """What an object holds that is no container of torch's: a dataclass, a distribution, a class of
    the user's own. None of modules, functions and classes."""
    if isinstance(value, (nn.Module, type, types.ModuleType)) or callable(value):
        return {}
    held = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            held[name] = getattr(value, name, None)
    return held


def _promote_one(t: Any, recording: Recording, depth: int = 0) -> Any:
    if not isinstance(t, Tensor):
        if depth < DEEPEST and (held := attributes(t)):
            promote(list(held.values()), recording, depth + 1)
        return t
    kind = type(t)
    if kind is nn.Parameter and isinstance(recording.state(t), Mixed):
        t._is_param = True  # for isinstance
    elif kind not in (Tensor, RecordedTensor):
        return t
    if isinstance(recording.state(t), (Tag, Reduced, Mixed, Order)):
        t.__class__ = RecordedTensor
        setattr(t, FOLLOWED, recording)
    return t


def beside(batch: Batch, model: nn.Module) -> Recording:
    """The recording of what is computed from a batch beside the model."""
    if batch.beside is None:
        batch.beside = Recording(model, {}, batch=batch, strict=False)
    recording: Recording = batch.beside
    return recording


def follow(t: Tensor, recording: Recording) -> None:
    """Let whatever is computed from `t` beside the model be followed as well."""
    _promote_one(t, beside(recording.states.batch, recording.states.model))


def refuse_mixed(t: Tensor) -> None:
    """Refuse what the data set or the collate function made of an earlier batch."""
    recording: Recording = getattr(t, FOLLOWED)
    with torch._C.DisableTorchFunctionSubclass():
        state = recording.state(t)
    if isinstance(state, (Mixed, Reduced)):
        raise ExamplesMixError(
            f"the data set or its collate function computes a tensor of shape {tuple(t.shape)} with "
            "values of an earlier batch, or of several examples. Each row must come from one example "
            "alone, and what one step's examples leave behind may not enter the next."
        )
