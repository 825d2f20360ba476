"""The task of a run on pictures: the loss of their views, tests, and what the report shows of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from dptorch.postprocessing import Ahead, Scaled
from dptorch.training.groups import grouped, majority
from dptorch.training.schedules import Schedule
from dptorch.training.task import confusion_of, outputs_of
from dptorch.vision.augmentation import Augmentation, Views
from dptorch.vision.dataset import Pictures
from dptorch.vision.methods import plain_state

if TYPE_CHECKING:
    from dptorch.training.run_folder import RunFolder

__all__ = ["ImageClassification"]

_SAMPLES: Final = 12
_THUMBNAIL: Final = 64  # pixels


@dataclass(frozen=True)
class ImageClassification:
    """The task of `dptorch.training.task.Task` for pictures with one class each, or several attributes.

    Attributes:
        classes: their names.
        schedule: of the learning rate.
        augmentation: draws the views of an example; None to take inputs as they are.
        steps_done: of the engine.
        build: a network without adapters, as the trained one was built.
        several: whether a picture may have several of the classes: labels are then 0 or 1 for each.
        batch_size: of tests.
        ahead: what the losses ahead and here count, of a model in `dptorch.postprocessing.Ahead`.
        collate: the loader's own.
    """

    classes: tuple[str, ...]
    schedule: Schedule
    augmentation: Augmentation | None
    steps_done: Callable[[], int]
    build: Callable[[], nn.Module]
    several: bool = False
    batch_size: int = 512
    ahead: tuple[float, float] | None = None
    collate: Callable[[list[Any]], Any] | None = None

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, int]:
        """Return the mean over examples of the mean over their views, and the number of examples."""
        x, y = batch
        x, y = x.to(device), y.to(device)
        if self.augmentation is not None:
            x = self.augmentation(x, self.steps_done())
        outputs = model(x)
        if self.ahead is None:
            return self._mean_over_views(outputs, y).mean(), len(y)
        ahead, here = (self._mean_over_views(outputs[:, i], y) for i in (0, 1))
        return (self.ahead[0] * ahead + self.ahead[1] * here).mean(), len(y)

    def _mean_over_views(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each example, [B], of outputs [B, L], or [B, K, L] of K views."""
        if self.augmentation is None:
            return self._losses(outputs, labels)
        losses = [self._losses(outputs[:, k], labels) for k in range(outputs.shape[1])]
        return torch.stack(losses, 1).mean(1)

    def _losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each example, [B]."""
        if self.several:
            return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").sum(1)
        return F.cross_entropy(outputs, labels, reduction="none")

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rates of this step."""
        self.schedule.apply(optimizer, step)

    def evaluate(
        self, model: nn.Module, test: Dataset[Any], device: torch.device
    ) -> dict[str, float]:
        """Return accuracy, of several attributes the mean of theirs, and the mean loss."""
        outputs, labels = outputs_of(model, test, device, batch_size=self.batch_size)
        right = self._right(outputs, labels)
        loss = float(self._losses(outputs, labels).mean())
        return {"test_accuracy": float(right.double().mean()), "test_loss": round(loss, 6)}

    def _right(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Bool [N], of several attributes [N, L]."""
        return (outputs > 0) == (labels > 0.5) if self.several else outputs.argmax(1) == labels

    def finish(self, model: nn.Module, test: Dataset[Any], device: torch.device) -> dict[str, Any]:
        """Return accuracy by class, which classes are taken for which, and some predictions."""
        outputs, labels = outputs_of(model, test, device, batch_size=self.batch_size)
        right = self._right(outputs, labels)
        if self.several:
            rows = [
                {"by": "attribute", "group": name, "examples": len(labels),
                 "accuracy": float(right[:, i].double().mean())}
                for i, name in enumerate(self.classes)
            ]  # fmt: skip
            most = torch.maximum(labels.mean(0), 1 - labels.mean(0)).mean()
            return {"groups": rows, "majority": float(most)}
        names = [self.classes[int(y)] for y in labels]
        return {
            "groups": grouped(right, None, names, {}),
            "majority": majority(names),
            "confusion": confusion_of(outputs, labels, len(self.classes)),
            "pictures": self._pictures(test, outputs, labels),
        }

    def _pictures(self, test: Any, outputs: Tensor, labels: Tensor) -> list[dict[str, Any]]:
        """Pictures evenly spaced in the test set, which may be sorted by class, and what is said."""
        if not isinstance(test, Pictures):
            return []
        found = []
        count = min(_SAMPLES, len(labels))
        for i in (k * len(labels) // count for k in range(count)):
            probabilities = outputs[i].softmax(0)
            said = int(probabilities.argmax())
            found.append(
                {
                    "image": _thumbnail(test.picture(i)),
                    "class": self.classes[int(labels[i])],
                    "said": self.classes[said],
                    "probability": round(float(probabilities[said]), 4),
                }
            )
        return found

    def write_model(self, folder: RunFolder, model: Any, metadata: dict[str, str]) -> None:
        """Write `model.safetensors`: one network, with what adapters add in its weights."""
        plain = self.build()
        while isinstance(model, Ahead | Scaled | Views):
            model = model.network
        plain.load_state_dict(plain_state(model))
        folder.write_model(plain, metadata)


def _thumbnail(picture: Any) -> str:
    """A picture as an address that holds the whole image."""
    picture = picture.convert("RGB")
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
