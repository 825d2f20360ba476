"""Names of ``opacus.optimizers``."""

from dptorch.compat.opacus.optimizers.optimizer import DPOptimizer, as_dp_optimizer
from dptorch.compat.stand_ins import ONE_PROCESS, stand_in

__all__ = [
    "AdaClipDPOptimizer",
    "DPOptimizer",
    "DPOptimizerFastGradientClipping",
    "DPPerLayerOptimizer",
    "DistributedDPOptimizer",
    "DistributedDPOptimizerFastGradientClipping",
    "FSDPOptimizerFastGradientClipping",
    "SimpleDistributedPerLayerOptimizer",
    "as_dp_optimizer",
]

# How an optimizer clips is a matter of its run, not of its class.
DPOptimizerFastGradientClipping = DPOptimizer
DPPerLayerOptimizer = DPOptimizer
AdaClipDPOptimizer = DPOptimizer
DistributedDPOptimizer = stand_in("DistributedDPOptimizer", ONE_PROCESS)
DistributedDPOptimizerFastGradientClipping = stand_in(
    "DistributedDPOptimizerFastGradientClipping", ONE_PROCESS
)
FSDPOptimizerFastGradientClipping = stand_in("FSDPOptimizerFastGradientClipping", ONE_PROCESS)
SimpleDistributedPerLayerOptimizer = stand_in("SimpleDistributedPerLayerOptimizer", ONE_PROCESS)
