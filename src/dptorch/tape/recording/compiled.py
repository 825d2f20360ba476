"""Let what torch.compile made run as it was written where a model is trained privately.

Compiled code is opaque to a recording. Dynamo would also trace the hooks and followed tensors
themselves. Without gradients nothing is recorded, and compiled code stays compiled.
"""

from __future__ import annotations

import functools
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dptorch.tape.recording.attached import is_training

__all__ = ["run_as_written", "uncompiled"]


def uncompiled() -> AbstractContextManager[Any]:
    """What torch.compile made of a model, or of parts of it, runs as it was written inside."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def run_as_written() -> None:
    """Let compiled code run as it was written where a model is trained privately, from now on.

    A function of the loop may be compiled with the model inside, where no hook has run yet.
    """
    if torch.compile.__module__ != __name__:
        torch.compile = _compile(torch.compile)
    if "torch._dynamo" in sys.modules:
        _patch()


def _compile(plain: Any) -> Any:
    @functools.wraps(plain)
    def compile(*args: Any, **kwargs: Any) -> Any:

        _patch()
        return plain(*args, **kwargs)

    compile.__module__ = __name__
    return compile


def _patch() -> None:
    """Let Dynamo ask whether a model is being trained wherever it asks for its stance."""
    from torch._dynamo import eval_frame

    plain: Any = eval_frame._stance
    if type(plain).__name__ == "_Stance":
        return

    class _Stance(type(plain)):  # type: ignore[misc]
        @property
        def stance(self) -> str:
            if is_training():
                return "force_eager"
            found: str = vars(self)["stance"]
            return found

    made = object.__new__(_Stance)
    made.__dict__.update(plain.__dict__)
    eval_frame._stance = made
