"""Names of ``opacus.optimizers``."""

from dptorch.compat.opacus.optimizers.optimizer import DPOptimizer, as_dp_optimizer
from dptorch.compat.opacus.stand_ins import stand_in

__all__ = [
    "AdaClipDPOptimizer",
    "DPOptimizer",
    "DPOptimizerFastGradientClipping",
    "DPPerLayerOptimizer",
    "DistributedDPOptimizer",
    "as_dp_optimizer",
]

# How an optimizer clips is a matter of its run, not of its class.
DPOptimizerFastGradientClipping = DPOptimizer
DPPerLayerOptimizer = DPOptimizer
AdaClipDPOptimizer = DPOptimizer
DistributedDPOptimizer = stand_in("DistributedDPOptimizer", "Train in one process.")
