"""The private step: plan, model, optimizer and loader held together.

`PrivacyEngine` is the way in. It holds the state of a run, adds up clipped gradients over a logical
batch and writes the noisy gradient that the optimizer steps with.
"""

from typing import TYPE_CHECKING, Any

from dptorch.engine.diagnostics import StepDiagnostics
from dptorch.engine.privacy_engine import PrivacyEngine

if TYPE_CHECKING:
    from dptorch.engine.sharded_checkpoint import load_shards, save_shards

__all__ = ["PrivacyEngine", "StepDiagnostics", "load_shards", "save_shards"]


def __getattr__(name: str) -> Any:
    if name in ("load_shards", "save_shards"):  # which few runs need
        from dptorch.engine import sharded_checkpoint

        return getattr(sharded_checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
