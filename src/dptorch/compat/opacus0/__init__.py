"""Opacus 0.x, by name and call. Change ``from opacus`` to ``from dptorch.compat.opacus0``.

What each call means here, where that differs: `docs/migrating.md`.
"""

from dptorch.compat.opacus0.privacy_engine import PrivacyEngine

__all__ = ["PrivacyEngine"]
