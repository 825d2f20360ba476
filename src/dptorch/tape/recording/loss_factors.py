"""Carry the numbers that the terms of an unreduced loss are multiplied by.

A reduced loss carries them in its state (`Reduced.factors`). A loss with one value for each example,
or for the one row of a batch, is tagged like any activation, so its factors are kept beside the tag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dptorch.tape.provenance.calls import each_tensor, words
from dptorch.tape.provenance.public_number import PublicNumber
from dptorch.tape.provenance.tags import Mixed, Reduced, Tag
from dptorch.tape.rules.recorder import Recorder

__all__ = ["carry_factors", "factors_of", "forget_factors"]

_FACTORS = "_dptorch_factors"
_KEEP = words(
    """neg view reshape flatten squeeze unsqueeze float double half bfloat16 to clone contiguous
    __getitem__ select expand sum mean type_as cuda cpu transpose"""
)
#: Of a scalar that the model itself returned: what was done inside is not known.
_UNKNOWN = None


def factors_of(t: Tensor) -> tuple[float, ...] | None:
    """Return what the terms of an unreduced loss were multiplied by; None if it is not known."""
    found: tuple[float, ...] | None = getattr(t, _FACTORS, (1.0,))
    return found


def forget_factors(t: Tensor) -> None:
    """Say that `t` is a scalar which the model returned for its one row."""
    setattr(t, _FACTORS, _UNKNOWN)


def carry_factors(
    recording: Recorder, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
) -> None:
    """Note the factors of what an op outside the model returned."""
    if not isinstance(out, Tensor) or not out.requires_grad:
        return
    state = recording.state(out)
    if not isinstance(state, (Tag, Reduced)):
        return
    losses = [
        t
        for t in each_tensor(tuple(args), kwargs)
        if t.requires_grad and t is not out and isinstance(recording.state(t), Tag)
    ]
    if not losses:
        return
    found = factors_of(losses[0])
    if name in ("add", "sub") and len(losses) == 2:
        second = factors_of(losses[1])
        alpha = float(kwargs.get("alpha", 1))
        if isinstance(state, Reduced):
            if found != second:
                return _refuse_weighted(recording, out)
        else:
            found = (
                None if found is None or second is None else (*found, *(f * alpha for f in second))
            )
    elif name == "add" and isinstance(state, Reduced):  # one more example's joins those of others
        others = out.__dict__.pop(_FACTORS, state.factors)
        if found != others:
            return _refuse_weighted(recording, out)
    elif name in ("mul", "div") and len(losses) == 1 and len(args) > 1:
        if name == "div" and args[0] is not losses[0]:
            return
        other = args[1] if args[0] is losses[0] else args[0]
        number = _number(recording, other)
        if number is not None and found is not None:
            scale = number if name == "mul" else 1 / number if number else float("inf")
            found = tuple(f * scale for f in found)
    elif name not in _KEEP and name not in ("mul", "div", "add", "sub"):
        return
    if isinstance(state, Reduced):
        recording.mark(out, Reduced(state.kind, found or (1.0,)))
    elif found != (1.0,):
        setattr(out, _FACTORS, found)


def _refuse_weighted(recording: Recorder, out: Tensor) -> None:
    recording.mark(
        out,
        Mixed(
            f"{recording.module_path()}: losses of single examples are added that were multiplied by "
            "different numbers, which may come from other examples. Multiply by a tensor of weights, "
            "(torch.stack(losses) * weights).mean()."
        ),
    )


def _number(recording: Recorder, value: Any) -> float | None:
    if isinstance(value, PublicNumber):
        return 1.0
    if isinstance(value, Tensor):
        constant = value.numel() == 1 or (value.numel() and not value.requires_grad)
        if not constant or recording.state(value) is not None:
            return None
        first = value.detach().reshape(-1)[:1]
        return float(first) if bool((value == first).all()) else None
    return float(value) if isinstance(value, (int, float)) else None
