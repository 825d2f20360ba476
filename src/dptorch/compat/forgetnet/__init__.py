"""ForgetNet, by name and call. Change ``from forgetnet`` to ``from dptorch.compat.forgetnet``.

The block shuffle gives no privacy guarantee, and says so; ``mechanism="gaussian"`` does, under the same
call. What each call means here, where that differs: `docs/migrating.md`.
"""

from __future__ import annotations

from typing import Any

from dptorch import blogs
from dptorch.audit.membership import ImageMIA, LanguageMIA
from dptorch.compat.forgetnet.engine import BloGSPrivacyEngine
from dptorch.errors import ConfigurationError

__all__ = ["BloGSPrivacyEngine", "BloGSSFTTrainer", "ImageMIA", "LanguageMIA"]

_NOT_HERE = {
    "DPShuffleGenerator": "what it does to gradients is dptorch.blogs.shuffle.BlockShuffle",
    "DifferentialPrivacyWeights": "noise on trained weights by a fitted formula has no guarantee; "
    "train with dptorch.PrivacyEngine",
}


def __getattr__(name: str) -> Any:
    if name == "BloGSSFTTrainer":  # only who asks for it needs TRL
        blogs.BloGSSFTTrainer  # noqa: B018  (says what to install)
        from dptorch.compat.forgetnet.trainer import BloGSSFTTrainer

        return BloGSSFTTrainer
    if name in _NOT_HERE:
        raise ConfigurationError(f"{name} is not here: {_NOT_HERE[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
