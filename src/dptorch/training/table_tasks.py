"""What a model of a table is trained for: classes, with weights if the schema has some, or a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dptorch.training.data import TrainTest
from dptorch.training.groups import grouped
from dptorch.training.run_folder import RunFolder
from dptorch.training.task import Classification, Task, outputs_of

__all__ = ["Regression", "task_of"]


@dataclass(frozen=True)
class Regression:
    """Inputs and targets that are scaled to [-1, 1], and a model that returns one number [B, 1].

    Attributes:
        bounds: what -1 and 1 stand for.
        subgroups: values of further columns for each test example, by column.
    """

    bounds: tuple[float, float]
    subgroups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    collate: Callable[[list[Any]], Any] | None = None

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, int]:
        """Return the mean squared error and the number of examples."""
        x, y = batch
        outputs_B1 = model(x.to(device))
        errors_B = outputs_B1[:, 0] - y.to(device).to(outputs_B1.dtype)
        return errors_B.square().mean(), len(y)

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Leave the learning rate as it is."""

    def evaluate(
        self, model: nn.Module, test: Dataset[Any], device: torch.device
    ) -> dict[str, float]:
        """Return errors in the units of the target, and the share of the variance explained."""
        outputs_N1, targets_N = outputs_of(model, test, device)
        half = (self.bounds[1] - self.bounds[0]) / 2
        targets_N = targets_N.double()
        # Predictions are clipped to the bounds, as `dptorch.load` does.
        errors_N = outputs_N1[:, 0].double().clamp(-1, 1) - targets_N
        squared = float(errors_N.square().mean())
        variance = float(targets_N.var(correction=0))
        return {
            "test_rmse": round(half * squared**0.5, 6),
            "test_mae": round(half * float(errors_N.abs().mean()), 6),
            "test_r2": round(1 - squared / variance, 6) if variance else 0.0,
            "test_loss": round(squared, 6),
        }

    def finish(self, model: nn.Module, test: Dataset[Any], device: torch.device) -> dict[str, Any]:
        """Return the error by subgroup."""
        outputs_N1, targets_N = outputs_of(model, test, device)
        half = (self.bounds[1] - self.bounds[0]) / 2
        errors_N = half * (outputs_N1[:, 0].double().clamp(-1, 1) - targets_N.double())
        return {"groups": grouped(None, errors_N.square(), [], self.subgroups)}

    def write_model(self, folder: RunFolder, model: nn.Module, metadata: dict[str, str]) -> None:
        """Write `model.safetensors`."""
        folder.write_model(model, metadata)


def task_of(data: TrainTest) -> Task:
    """What a model of this data is trained for."""
    if data.table is None:
        return Classification(classes=data.classes)
    label, subgroups = data.table.schema.label, data.table.subgroups
    if label.bounds is not None:
        return Regression(label.bounds, subgroups)
    weights = tuple(float(label.weights.get(c, 1.0)) for c in data.classes if label.weights)
    return Classification(weights, data.classes, subgroups)
