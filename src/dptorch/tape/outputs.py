"""Model outputs that remember their recording, so that a loss computed outside it is still followed.

A recording ends with the model's forward, but the loss comes after. The outputs that need a gradient
become `RecordedTensor`s: ordinary tensors in every respect, whose further ops are followed like
those inside the model. So a loss that mixes examples is refused, the kind of reduction is known, and
``loss.backward()`` accepts one loss for each example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dptorch.tape.calls import each_tensor
from dptorch.tape.invisible import visible
from dptorch.tape.provenance import Mixed, Reduced, Tag
from dptorch.tape.recording import Recording

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
        recording = next(
            (
                r
                for t in each_tensor(args, kwargs)
                if (r := getattr(t, _RECORDING, None)) is not None
            ),
            None,
        )
        with torch._C.DisableTorchFunctionSubclass():
            if recording is None:
                return func(*args, **kwargs)
            with visible():
                return promote(recording.handle(func, args, kwargs), recording)


def promote(value: Any, recording: Recording) -> Any:
    """Turn the tensors in `value` that carry examples, and need a gradient, into RecordedTensors."""
    return tree_map(lambda t: _promote_one(t, recording), value)


def _promote_one(t: Any, recording: Recording) -> Any:
    if not isinstance(t, Tensor) or isinstance(t, torch.nn.Parameter) or not t.requires_grad:
        return t
    if isinstance(recording.state(t), (Tag, Reduced, Mixed)) and type(t) in (Tensor, RecordedTensor):
        t.__class__ = RecordedTensor
        setattr(t, _RECORDING, recording)
    return t
