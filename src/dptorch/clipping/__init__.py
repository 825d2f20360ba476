"""Clipping: bound what one example can contribute."""

from dptorch.clipping.adaptive import COUNTS, AdaptiveClipping, centred_counts, noise_scales
from dptorch.clipping.functions import FUNCTIONS, LEAST_NORM, coefficients, get_clipping_function
from dptorch.clipping.groups import (
    STYLES,
    ClippingGroup,
    GroupSpec,
    groups_of,
    joint_norm,
    read_style,
)

__all__ = [
    "COUNTS",
    "FUNCTIONS",
    "LEAST_NORM",
    "STYLES",
    "AdaptiveClipping",
    "ClippingGroup",
    "GroupSpec",
    "centred_counts",
    "coefficients",
    "get_clipping_function",
    "groups_of",
    "joint_norm",
    "noise_scales",
    "read_style",
]
