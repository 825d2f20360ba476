"""DP-BloGS, ForgetNet's block-wise gradient shuffle: the method as published, its index as an index.

The shuffle is a heuristic without any privacy guarantee. `BloGSPrivacyEngine` with
``mechanism="gaussian"`` is the sound way under the same call.
"""

from typing import Any

from dptorch.blogs.blogs_engine import BloGSPrivacyEngine
from dptorch.blogs.index import INDICES
from dptorch.blogs.index_statement import BloGSSpent, BloGSStatement

__all__ = ["INDICES", "BloGSPrivacyEngine", "BloGSSFTTrainer", "BloGSSpent", "BloGSStatement"]


def __getattr__(name: str) -> Any:
    if name == "BloGSSFTTrainer":  # only who asks for it needs TRL
        try:
            from dptorch.blogs.trl_trainer import BloGSSFTTrainer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"BloGSSFTTrainer needs TRL, and {error.name!r} is not installed: "
                "pip install 'dptorch[trl]'.",
                name=error.name,
            ) from error
        return BloGSSFTTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
