"""The private step: plan, model, optimizer and loader held together.

`PrivacyEngine` is the way in. It holds the state of a run, adds up clipped gradients over a logical
batch and writes the noisy gradient that the optimizer steps with.
"""

from dptorch.engine.diagnostics import StepDiagnostics
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.engine.sharded_checkpoint import load_shards, save_shards

__all__ = ["PrivacyEngine", "StepDiagnostics", "load_shards", "save_shards"]
