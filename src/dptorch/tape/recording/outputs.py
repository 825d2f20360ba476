"""Model outputs that remember their recording, so that a loss computed outside it is still followed.

A recording ends with the model's forward, but the loss comes after. The outputs that need a gradient
become `RecordedTensor`s: ordinary tensors in every respect, whose further ops are followed like
those inside the model. So a loss that mixes examples is refused, the kind of reduction is known, and
``loss.backward()`` accepts one loss for each example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dptorch.errors import ConfigurationError
from dptorch.tape.provenance.calls import each_tensor
from dptorch.tape.provenance.tags import Mixed, Reduced, Tag
from dptorch.tape.recording.patches import patched
from dptorch.tape.recording.recording import Recording

__all__ = ["RecordedTensor", "promote"]

_RECORDING = "_dptorch_recording"


class RecordedTensor(torch.Tensor):
    """A tensor computed from a recorded model's output. Detached values are plain tensors."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        recorded = [t for t in each_tensor(args, kwargs) if hasattr(t, _RECORDING)]
        with torch._C.DisableTorchFunctionSubclass():
            if not recorded:
                return func(*args, **kwargs)
            recording: Recording = getattr(recorded[0], _RECORDING)
            for t in recorded[1:]:
                _adopt(t, recording)
            with patched():
                return promote(recording.handle(func, args, kwargs), recording)


def _adopt(t: Tensor, recording: Recording) -> None:
    """Follow another model's output (a generator's, say) in this recording too."""
    other: Recording = getattr(t, _RECORDING)
    state = other.state(t)
    if other is recording or state is None:
        return
    if isinstance(state, Tag) and other.batch_size != recording.batch_size:
        raise ConfigurationError(
            f"outputs for {other.batch_size} and for {recording.batch_size} examples meet in one "
            "loss. Compute a loss for each forward pass, and call backward() on each."
        )
    recording.mark(t, state)
    setattr(t, _RECORDING, recording)
    recording.joined += [other.tape, *other.joined]


def promote(value: Any, recording: Recording) -> Any:
    """Turn the tensors in `value` that carry examples, and need a gradient, into RecordedTensors."""
    if isinstance(value, Tensor):
        return _promote_one(value, recording)
    tree_map(lambda t: _promote_one(t, recording), value)
    return value


def _promote_one(t: Any, recording: Recording) -> Any:
    if dataclasses.is_dataclass(t) and not isinstance(t, type):
        promote([getattr(t, f.name, None) for f in dataclasses.fields(t)], recording)
        return t
    if not isinstance(t, Tensor) or isinstance(t, torch.nn.Parameter) or not t.requires_grad:
        return t
    if isinstance(recording.state(t), (Tag, Reduced, Mixed)) and type(t) in (
        Tensor,
        RecordedTensor,
    ):
        t.__class__ = RecordedTensor
        setattr(t, _RECORDING, recording)
    return t
