"""Names of ``opacus.distributed``, each of which says that training is in one process."""

from __future__ import annotations

from dptorch.compat.opacus.stand_ins import stand_in

__all__ = ["DifferentiallyPrivateDistributedDataParallel", "average_gradients"]

_INSTEAD = (
    "The clipped sums of all processes have to be added up before noise is, and that is not built yet. "
    "Train in one process: give the model itself to PrivacyEngine.make_private, and use "
    "BatchMemoryManager for large batches."
)

DifferentiallyPrivateDistributedDataParallel = stand_in(
    "DifferentiallyPrivateDistributedDataParallel", _INSTEAD
)
average_gradients = stand_in("average_gradients", _INSTEAD)
