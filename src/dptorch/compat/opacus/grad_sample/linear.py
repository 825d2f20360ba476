"""Names of ``opacus.grad_sample.linear``, which linear layers here have no use for."""

from __future__ import annotations

from dptorch.compat.stand_ins import NOT_BY_LAYER, stand_in

__all__ = ["compute_linear_grad_sample", "compute_linear_norm_sample"]

compute_linear_grad_sample = stand_in("compute_linear_grad_sample", NOT_BY_LAYER)
compute_linear_norm_sample = stand_in("compute_linear_norm_sample", NOT_BY_LAYER)
