"""Names of ``opacus.grad_sample``."""

from dptorch.compat.opacus.grad_sample.grad_sample_module import GradSampleModule
from dptorch.compat.opacus.grad_sample.utils import (
    get_gsm_class,
    register_grad_sampler,
    register_norm_sampler,
    wrap_model,
)
from dptorch.compat.stand_ins import ONE_PROCESS, stand_in

__all__ = [
    "GradSampleModule",
    "GradSampleModuleExpandedWeights",
    "GradSampleModuleFastGradientClipping",
    "GradSampleModuleFastGradientClippingFSDP",
    "GradSampleModuleFastGradientClippingTP",
    "GradSampleModuleNoOp",
    "get_gsm_class",
    "register_grad_sampler",
    "register_norm_sampler",
    "wrap_model",
]

#: All of Opacus's modes give the same gradients here, so one class has all their names.
GradSampleModuleFastGradientClipping = GradSampleModule
GradSampleModuleExpandedWeights = GradSampleModule
GradSampleModuleFastGradientClippingFSDP = stand_in(
    "GradSampleModuleFastGradientClippingFSDP", ONE_PROCESS
)
GradSampleModuleFastGradientClippingTP = stand_in(
    "GradSampleModuleFastGradientClippingTP", ONE_PROCESS
)
GradSampleModuleNoOp = stand_in(
    "GradSampleModuleNoOp",
    "Gradients that the user computes cannot be vouched for. Use grad_sample_mode='hooks'.",
)
