"""Name the place that an error is about: the module whose forward runs, the line of the user's code.

Both walk the stack, so only errors pay for them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

__all__ = [
    "OUTSIDE",
    "module_path",
    "reading_modules",
    "user_line",
    "way_out_of_a_known_module",
    "way_out_of_a_trainer",
]

#: Where code runs that is no module's forward.
OUTSIDE = "outside the model"
_TRAINERS = ("transformers.trainer", "trl.trainer")
_PRIVATE_TRAINERS = "dptorch.integrations.transformers"
_WAYS_OUT = {
    "SwitchTransformersExperts": "dptorch.prepare(model) lets every expert run, with the same result.",
    "LongformerSelfAttention": "Global attention of a Longformer is padded to the example that has "
    "most of it. Train the body without it, LongformerModel(config, add_pooling_layer=False), under a "
    "head of your own.",
}
_LIBRARIES = (
    str(Path(__file__).parents[2]),
    str(Path(torch.__file__).parent),
)


def module_path(model: nn.Module) -> str:
    """Return the name of the innermost module of `model` whose forward is running."""
    names = {id(m): n for n, m in model.named_modules()}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            name = names[id(owner)]
            kind = type(owner).__name__
            return f"module '{name}' ({kind})" if name else f"the model ({kind})"
        frame = frame.f_back
    return OUTSIDE


def user_line() -> str:
    """Return ``"file.py, line 12: code"`` of the innermost frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(_LIBRARIES) and not path.startswith("<"):
            return f"{Path(path).name}, line {frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def reading_modules() -> Iterator[str]:
    """Yield the names of the modules whose code runs now, innermost first, this package left out."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith("dptorch."):
            yield name
        frame = frame.f_back


def way_out_of_a_known_module() -> str:
    """Return a sentence for a module of transformers that mixes examples, and need not."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        kind = type(owner).__name__
        if kind in _WAYS_OUT:
            return f" {_WAYS_OUT[kind]}"
        config = getattr(owner, "config", None)
        if kind.endswith("Experts") and hasattr(config, "_experts_implementation"):
            return (
                " A mixture of experts of transformers sorts the tokens of all examples, but for "
                "model.set_experts_implementation('batched_mm')."
            )
        frame = frame.f_back
    return ""


def way_out_of_a_trainer() -> str:
    """Return a sentence that names the private trainer, if the loop that runs is transformers' own."""
    frame: FrameType | None = sys._getframe(1)
    found = False
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(_PRIVATE_TRAINERS):
            return ""
        found = found or name.startswith(_TRAINERS)
        frame = frame.f_back
    if not found:
        return ""
    return (
        " The loop is that of transformers' Trainer, which divides by the tokens of the whole batch "
        f"and joins several draws in a step. Train with {_PRIVATE_TRAINERS}.DPTrainer or "
        "DPSFTTrainer, which take its arguments and do neither."
    )
