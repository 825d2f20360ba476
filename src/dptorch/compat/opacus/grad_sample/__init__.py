"""Names of ``opacus.grad_sample``."""

from dptorch.compat.opacus.grad_sample.grad_sample_module import GradSampleModule
from dptorch.compat.opacus.stand_ins import stand_in

__all__ = [
    "GradSampleModule",
    "GradSampleModuleExpandedWeights",
    "GradSampleModuleFastGradientClipping",
    "GradSampleModuleNoOp",
    "register_grad_sampler",
]

# All of Opacus's modes give the same gradients here, so one class has all their names.
GradSampleModuleFastGradientClipping = GradSampleModule
GradSampleModuleExpandedWeights = GradSampleModule
GradSampleModuleNoOp = stand_in(
    "GradSampleModuleNoOp",
    "Gradients that the user computes cannot be vouched for. Use grad_sample_mode='hooks'.",
)
register_grad_sampler = stand_in(
    "register_grad_sampler",
    "Layers of your own are followed op by op and need no gradient of their own: leave it out.",
)
