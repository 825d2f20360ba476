"""ForgetNet's privacy engine by its own name and call."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dptorch import blogs

__all__ = ["BloGSPrivacyEngine", "with_minimum"]


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
