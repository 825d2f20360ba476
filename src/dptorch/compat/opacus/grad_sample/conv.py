"""Names of ``opacus.grad_sample.conv``, which convolutions here have no use for."""

from __future__ import annotations

from dptorch.compat.stand_ins import NOT_BY_LAYER, stand_in

__all__ = ["compute_conv_grad_sample", "convolution2d_backward_as_a_convolution"]

compute_conv_grad_sample = stand_in("compute_conv_grad_sample", NOT_BY_LAYER)
convolution2d_backward_as_a_convolution = stand_in(
    "convolution2d_backward_as_a_convolution", NOT_BY_LAYER
)
