"""ForgetNet, by name and call. Change ``from forgetnet`` to ``from dptorch.compat.forgetnet``.

The block shuffle gives no privacy guarantee, and says so; ``mechanism="gaussian"`` does, under the same
call. What each call means here, where that differs: `docs/migrating.md`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dptorch import blogs
from dptorch.audit.membership import ImageMIA, LanguageMIA
from dptorch.errors import ConfigurationError

__all__ = ["BloGSPrivacyEngine", "BloGSSFTTrainer", "ImageMIA", "LanguageMIA"]

_NOT_HERE = {
    "DPShuffleGenerator": "what it does to gradients is dptorch.blogs.shuffle.BlockShuffle",
    "DifferentialPrivacyWeights": "noise on trained weights by a fitted formula has no guarantee; "
    "train with dptorch.PrivacyEngine",
}


class BloGSPrivacyEngine(blogs.BloGSPrivacyEngine):
    """`dptorch.blogs.BloGSPrivacyEngine`, and as ForgetNet's it goes on where a target is below what
    blocks of one coordinate have: with those, to their index, and a warning that names it.

    Args:
        optimizer, model, target_epsilon, delta, clip_value, steps, batch_size, dataset_size, options: \
see `dptorch.blogs.BloGSPrivacyEngine`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        target_epsilon: float,
        delta: float,
        clip_value: float,
        steps: int,
        batch_size: int,
        dataset_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            optimizer,
            model,
            target_epsilon,
            delta,
            clip_value,
            steps,
            batch_size,
            dataset_size,
            **with_minimum(options, options.get("mechanism", "shuffle")),
        )


def with_minimum(options: dict[str, Any], mechanism: str) -> dict[str, Any]:
    """The options of a run whose shuffle goes on at its smallest blocks."""
    return {"on_unattainable": "minimum", **options} if mechanism == "shuffle" else options


def __getattr__(name: str) -> Any:
    if name == "BloGSSFTTrainer":  # only who asks for it needs TRL
        blogs.BloGSSFTTrainer  # noqa: B018  (says what to install)
        from dptorch.compat.forgetnet.trainer import BloGSSFTTrainer

        return BloGSSFTTrainer
    if name in _NOT_HERE:
        raise ConfigurationError(f"{name} is not here: {_NOT_HERE[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
