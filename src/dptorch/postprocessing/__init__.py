"""What helps with the noise: averages of weights, filters and scales of gradients (docs/vision.md).

    from dptorch.postprocessing import KalmanFilter, LowPassFilter, MomentScaling, WeightAverage

Everything here is computed from noisy gradients and released weights, so it costs no privacy. It hooks
into the step of any `torch.optim` optimizer, with any engine or none.
"""

from dptorch.postprocessing.kalman_filter import Ahead, KalmanFilter
from dptorch.postprocessing.low_pass_filter import LowPassFilter
from dptorch.postprocessing.moment_scaling import MomentScaling, Scaled
from dptorch.postprocessing.weight_average import WeightAverage

__all__ = ["Ahead", "KalmanFilter", "LowPassFilter", "MomentScaling", "Scaled", "WeightAverage"]
