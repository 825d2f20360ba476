"""What a run trains for: the loss of a batch, how a model is tested, and how it is kept.

The loop of `dptorch.training.loop`, its checkpoints, run folder and report are the same for every task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dptorch.training.groups import grouped, majority

if TYPE_CHECKING:
    from dptorch.training.data import Example
    from dptorch.training.run_folder import RunFolder

__all__ = [
    "TESTED",
    "Classification",
    "Task",
    "confusion_of",
    "evaluate",
    "headline",
    "outputs_of",
]

#: Columns of test results that a run is judged by, with their names in words and how they are written.
TESTED: Final[Mapping[str, tuple[str, str]]] = {
    "test_accuracy": ("test accuracy", ".3f"),
    "test_rmse": ("test RMSE", ".5g"),
    "test_perplexity": ("test perplexity", ".2f"),
}


class Task(Protocol):
    """What differs between runs that train for different ends."""

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        """Makes a batch of a list of examples; None for the loader's own."""

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, int]:
        """Return the mean over examples of each one's loss, and the number of examples."""

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set what follows a schedule, a function of the number of steps that are done."""

    def evaluate(
        self, model: nn.Module, test: Dataset[Any], device: torch.device
    ) -> dict[str, float]:
        """Return the test results of a row of `metrics.csv`; names begin with ``test_``."""

    def finish(self, model: nn.Module, test: Dataset[Any], device: torch.device) -> dict[str, Any]:
        """Return what else the finished run's `run.json` says: further results, samples."""

    def write_model(self, folder: RunFolder, model: nn.Module, metadata: dict[str, str]) -> None:
        """Write the trained model into the run's folder."""


@dataclass(frozen=True)
class Classification:
    """Inputs and integer classes, and a model that returns logits [B, K].

    Attributes:
        weights: a factor of the loss for each class, a public constant; empty for none.
        classes: their names, by which the finished run's results are told apart; empty for none.
        subgroups: values of further columns for each test example, by column.
    """

    weights: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    subgroups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    collate: Callable[[list[Any]], Any] | None = None

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, int]:
        """Return the mean cross-entropy and the number of examples."""
        x, y = batch
        x, y = x.to(device), y.to(device)
        if not self.weights:
            return F.cross_entropy(model(x), y), len(y)
        # The mean is over the rows, whatever their classes: weights do not divide.
        losses_B = F.cross_entropy(model(x), y, reduction="none")
        return (losses_B * losses_B.new_tensor(self.weights)[y]).mean(), len(y)

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Leave the learning rate as it is."""

    def evaluate(
        self, model: nn.Module, test: Dataset[Any], device: torch.device
    ) -> dict[str, float]:
        """Return accuracy and mean cross-entropy."""
        accuracy, loss = evaluate(model, test, device)
        return {"test_accuracy": accuracy, "test_loss": round(loss, 6)}

    def finish(self, model: nn.Module, test: Dataset[Any], device: torch.device) -> dict[str, Any]:
        """Return accuracy by class and subgroup, and that of whoever says the largest class."""
        if not self.classes:
            return {}
        outputs, labels = outputs_of(model, test, device)
        names = [self.classes[int(y)] for y in labels]
        right = outputs.argmax(1) == labels
        return {
            "groups": grouped(right, None, names, self.subgroups),
            "majority": majority(names),
        }

    def write_model(self, folder: RunFolder, model: nn.Module, metadata: dict[str, str]) -> None:
        """Write `model.safetensors`."""
        folder.write_model(model, metadata)


def evaluate(model: nn.Module, test: Dataset[Example], device: torch.device) -> tuple[float, float]:
    """(accuracy, mean cross-entropy) of a model in evaluation mode.

    The result is exact, without noise. It is covered by no guarantee towards the test examples.
    """
    outputs, labels = outputs_of(model, test, device)
    correct = int((outputs.argmax(1) == labels).sum())
    loss = float(F.cross_entropy(outputs, labels, reduction="sum"))
    return correct / len(labels), loss / len(labels)


def outputs_of(
    model: nn.Module, test: Dataset[Example], device: torch.device, *, batch_size: int = 512
) -> tuple[Tensor, Tensor]:
    """(outputs [N, K], labels [N]) of a model in evaluation mode, on the CPU."""
    was_training = model.training
    model.eval()
    outputs, labels = [], []
    with torch.no_grad():
        for x, y in DataLoader(test, batch_size=batch_size):
            outputs.append(model(x.to(device)).cpu())
            labels.append(y)
    model.train(was_training)
    return torch.cat(outputs), torch.cat(labels)


def confusion_of(outputs: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """How many examples of each class (row) the model takes for each class (column).

    Example:
        >>> confusion_of(torch.eye(2)[[0, 1, 1]], torch.tensor([0, 0, 1]), 2)
        [[1, 1], [0, 1]]
    """
    pairs = labels.long() * classes + outputs.argmax(1)
    found: list[list[int]] = pairs.bincount(minlength=classes**2).reshape(classes, classes).tolist()
    return found


def headline(row: Mapping[str, Any]) -> str:
    """Return the test result of a row in words.

    Example:
        >>> headline({"test_accuracy": 0.75, "test_loss": 0.5})
        'test accuracy 0.750'
    """
    column = next(c for c in TESTED if c in row)
    words, form = TESTED[column]
    return f"{words} {row[column]:{form}}"
