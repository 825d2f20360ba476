"""Names of ``opacus.distributed``, each of which says that training is in one process."""

from __future__ import annotations

from dptorch.compat.stand_ins import ONE_PROCESS, stand_in

__all__ = ["DifferentiallyPrivateDistributedDataParallel", "average_gradients"]

DifferentiallyPrivateDistributedDataParallel = stand_in(
    "DifferentiallyPrivateDistributedDataParallel", ONE_PROCESS
)
average_gradients = stand_in("average_gradients", ONE_PROCESS)
