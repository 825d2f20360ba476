"""Opacus 1.x, by name and call. Change ``from opacus`` to ``from dptorch.compat.opacus``.

What each call means here, where that differs: `docs/migrating.md`.
"""

from dptorch.compat.opacus import utils
from dptorch.compat.opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)
from dptorch.compat.opacus.privacy_engine import PrivacyEngine

__all__ = ["GradSampleModule", "GradSampleModuleFastGradientClipping", "PrivacyEngine", "utils"]
