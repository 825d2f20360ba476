"""Names of ``opacus.lightning``."""

from __future__ import annotations

from dptorch.compat.stand_ins import stand_in

__all__ = ["DPLightningDataModule"]

DPLightningDataModule = stand_in(
    "DPLightningDataModule",
    "Batches have to come from the loader of the run that counts them. Call "
    "PrivacyEngine.make_private before Trainer.fit, and pass the loader that it returns as "
    "train_dataloaders.",
)
