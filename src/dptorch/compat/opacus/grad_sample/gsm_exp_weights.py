"""`GradSampleModuleExpandedWeights`: all of Opacus's modes give the same gradients here."""

from dptorch.compat.opacus.grad_sample.grad_sample_module import (
    GradSampleModule as GradSampleModuleExpandedWeights,
)

__all__ = ["GradSampleModuleExpandedWeights"]
