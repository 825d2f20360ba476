"""Names of ``opacus.utils.fast_gradient_clipping_utils``."""

from __future__ import annotations

from dptorch.compat.stand_ins import stand_in

__all__ = ["DPLossFastGradientClipping", "DPTensorFastGradientClipping"]

_INSTEAD = (
    "The loss needs no wrapper: its two backward passes are made by loss.backward(). Call "
    "PrivacyEngine.make_private(..., grad_sample_mode='ghost'), which returns the criterion as it is."
)
DPLossFastGradientClipping = stand_in("DPLossFastGradientClipping", _INSTEAD)
DPTensorFastGradientClipping = stand_in("DPTensorFastGradientClipping", _INSTEAD)
