"""Names of ``opacus.utils.tensor_utils``, with which Opacus computes gradients layer by layer."""

from __future__ import annotations

from dptorch.compat.stand_ins import NOT_BY_LAYER, stand_in

__all__ = ["calc_sample_norms", "unfold2d", "unfold3d"]

calc_sample_norms = stand_in("calc_sample_norms", NOT_BY_LAYER)
unfold2d = stand_in("unfold2d", NOT_BY_LAYER)
unfold3d = stand_in("unfold3d", NOT_BY_LAYER)
