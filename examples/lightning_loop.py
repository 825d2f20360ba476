"""A LightningModule whose optimizer and loader are an engine's.

Run: python examples/lightning_loop.py    (pip install 'dptorch[report]' pytorch-lightning)
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dptorch import PrivacyEngine


class Digits(pl.LightningModule):
    """A classifier with its engine: Lightning asks it for the optimizer and for the loader."""

    def __init__(self, epochs: int, size: int, batch_size: int) -> None:
        super().__init__()
        digits = load_digits()
        x = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
        y = torch.tensor(digits.target)
        self.data, self.rest = TensorDataset(x[:size], y[:size]), TensorDataset(x[size:], y[size:])
        self.model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.engine = PrivacyEngine(
            self.model,
            sample_size=size,
            batch_size=batch_size,
            epochs=epochs,
            target_epsilon=3.0,
            target_delta=1e-4,
        )

    def configure_optimizers(self) -> Any:
        """The optimizer, made private; with a schedule."""
        optimizer = self.engine.attach(torch.optim.Adam(self.model.parameters(), lr=0.01))
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10),
        }

    def train_dataloader(self) -> Any:
        """Batches as epsilon assumes them. Lightning must not put a sampler of its own there."""
        return self.engine.loader(self.data)

    def val_dataloader(self) -> Any:
        """The digits that are not trained on."""
        return DataLoader(self.rest, batch_size=256)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Accuracy, and what was spent."""
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())
        self.log("epsilon", self.engine.get_privacy_spent().epsilon)


def train(epochs: int = 20, size: int = 1437, batch_size: int = 64) -> tuple[float, float]:
    """Return (accuracy on digits that were not trained on, epsilon)."""
    module = Digits(epochs, size, batch_size)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module)
    return float(trainer.callback_metrics["accuracy"]), module.engine.get_privacy_spent().epsilon


if __name__ == "__main__":
    print("accuracy {:.3f}, epsilon {:.2f}".format(*train()))
