"""Trainers of transformers and TRL that train under differential privacy (docs/transformers.md).

    from dptorch.integrations.transformers import DPTrainer, PrivacyArguments

Only who asks for a trainer loads transformers, and only who asks for `DPSFTTrainer` loads TRL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dptorch.integrations.transformers.privacy_arguments import PrivacyArguments

if TYPE_CHECKING:
    from dptorch.integrations.transformers.sft_trainer import DPSFTTrainer
    from dptorch.integrations.transformers.trainers import DPSeq2SeqTrainer, DPTrainer

__all__ = ["DPSFTTrainer", "DPSeq2SeqTrainer", "DPTrainer", "PrivacyArguments"]

_WHERE: Final = {
    "DPTrainer": ("trainers", "transformers"),
    "DPSeq2SeqTrainer": ("trainers", "transformers"),
    "DPSFTTrainer": ("sft_trainer", "trl"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, extra = _WHERE[name]
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs {error.name!r}, which is not installed: pip install 'dptorch[{extra}]'"
        ) from error
